"""This machine's GPUs, seen from the outside: by nvidia-smi and environment variables, without a CUDA context.

An ordinal is valid in one process only. Between processes a GPU is named by its UUID, in torch's form: without the
`GPU-` that the driver and CUDA_VISIBLE_DEVICES put before it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING, NamedTuple

from weightsync.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Gpu", "all_gpus", "driver_cuda", "links", "peer_states", "seen_by", "survey"]

_SECONDS = 10  # for nvidia-smi to answer
_NO_DEVICES = "No devices were found"  # printed if the driver works and there is no GPU
_UNDERLINED = re.compile(r"\x1b\[\d*m")  # escape codes that some versions put around table heads


class Gpu(NamedTuple):
    """The driver's answer about one GPU."""

    uuid: str
    free: int | None  # bytes of its memory; None if the driver does not say
    mig: bool  # it is divided into instances


def survey() -> list[Gpu]:
    """Return this machine's (or container's) GPUs, in the driver's order; none if there is no nvidia-smi.

    Calls nvidia-smi once. Raises `ConfigError` if it fails.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    listed = _nvidia_smi("--query-gpu=uuid,memory.free,mig.mode.current", "--format=csv,noheader,nounits")
    rows = [[value.strip() for value in line.split(",")] for line in listed.splitlines() if line.strip()]
    return [
        Gpu(uuid.removeprefix("GPU-"), int(mebibytes) * 2**20 if mebibytes.isdecimal() else None, mode == "Enabled")
        for uuid, mebibytes, mode in rows
    ]


def all_gpus() -> list[str]:
    """Return the UUIDs of this machine's GPUs. Raises as `survey`."""
    return [gpu.uuid for gpu in survey()]


def driver_cuda() -> tuple[int, int]:
    """Return the latest CUDA that the driver runs, as (major, minor). Raises `ConfigError` if nvidia-smi fails."""
    told = _nvidia_smi("--version")
    found = re.search(r"^\s*CUDA[\w ]*version\s*:\s*(\d+)\.(\d+)", told, re.IGNORECASE | re.MULTILINE)
    if found is None:
        raise ConfigError("nvidia-smi --version names no CUDA version", hint="is the driver installed whole?")
    return int(found[1]), int(found[2])


def links() -> dict[tuple[int, int], str]:
    """Return the link between each two GPUs, in nvidia-smi's words: NV18 (that many NVLinks), PIX, PXB, PHB, NODE, SYS.

    Keys are indices in the driver's order. Raises `ConfigError` if nvidia-smi fails.
    """
    found: dict[tuple[int, int], str] = {}
    count = 0
    for line in _nvidia_smi("topo", "-m").splitlines():
        head, *cells = _UNDERLINED.sub("", line).split() or [""]
        if head == "GPU0" and cells[:1] != ["X"]:  # the table's head; columns of adapters and affinities come last
            count = sum(bool(re.fullmatch(r"GPU\d+", cell)) for cell in [head, *cells])
        elif re.fullmatch(r"GPU\d+", head) and len(cells) >= count:
            one = int(head.removeprefix("GPU"))
            found |= {(one, other): cell for other, cell in enumerate(cells[:count]) if other != one}
    return found


def peer_states() -> dict[tuple[int, int], str]:
    """Return whether each GPU can read each other GPU's memory: "OK", or nvidia-smi's word for why not (GNS, CNS, …).

    Keys are (reader, owner), indices in the driver's order. Raises `ConfigError` if nvidia-smi fails.
    """
    states: dict[tuple[int, int], str] = {}
    for line in _nvidia_smi("topo", "-p2p", "r").splitlines():
        head, *cells = _UNDERLINED.sub("", line).split() or [""]
        if re.fullmatch(r"GPU\d+", head) and cells and not cells[0].startswith("GPU"):
            reader = int(head.removeprefix("GPU"))
            states |= {(reader, owner): cell for owner, cell in enumerate(cells) if owner != reader}
    return states


def _nvidia_smi(*arguments: str) -> str:
    """Return nvidia-smi's output, "" if it finds no GPU. Raises `ConfigError` with its own words if it fails."""
    command = ["nvidia-smi", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"cannot query the GPUs: {error}", hint="nvidia-smi has to work") from error
    if _NO_DEVICES in done.stdout:
        return ""
    if done.returncode:
        words = " ".join(f"{done.stdout} {done.stderr}".split())
        raise ConfigError(
            f"{' '.join(command)} fails with status {done.returncode}: {words}",
            hint="mend the driver (in a container: --gpus=all), or remove nvidia-smi where there is no GPU",
        )
    return done.stdout


def seen_by(environment: Mapping[str, str], gpus: Sequence[str]) -> list[str]:
    """Return the GPUs among `gpus` that a process started with `environment` sees: UUIDs by its ordinals.

    CUDA's own rules: numbers count in the driver's order, UUIDs may be shortened, and the list ends before the first
    entry that names no GPU. Raises `ConfigError` for MIG instances, which cannot share memory with each other.
    """
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return list(gpus)
    found = []
    for name in (part.strip() for part in wanted.split(",")):
        if name.startswith("MIG-"):
            raise ConfigError(
                f"{name}: memory cannot be shared between MIG instances", hint='use whole GPUs, or arena.device = "cpu"'
            )
        if name.isdecimal():
            at = int(name)
            matches = [gpus[at]] if at < len(gpus) else []
        else:
            matches = [gpu for gpu in gpus if name and gpu.startswith(name.removeprefix("GPU-"))]
        if len(matches) != 1:
            break
        found += matches
    return found
