"""Which GPUs a process sees, told from the outside: its CUDA_VISIBLE_DEVICES and the driver's list, no CUDA context.

Ordinals mean something in one process only. Between processes a GPU is named by its UUID, here as torch prints it,
without the `GPU-` that the driver and CUDA_VISIBLE_DEVICES put before it.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from weightsync.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["all_gpus", "free_memory", "seen_by"]


def all_gpus() -> list[str]:
    """UUIDs of this machine's GPUs (of this container's), in the driver's order; empty where there is none.

    Asks nvidia-smi, and gives it ten seconds.
    """
    return [uuid for uuid, *_ in _query("uuid")]


def free_memory() -> dict[str, int]:
    """Free bytes of each of this machine's GPUs, by UUID."""
    return {uuid: int(mebibytes) * 2**20 for uuid, mebibytes in _query("uuid,memory.free") if mebibytes.isdecimal()}


def _query(fields: str) -> list[list[str]]:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[value.strip() for value in line.split(",")] for line in listed.splitlines() if line.strip()]
    return [[uuid.removeprefix("GPU-"), *rest] for uuid, *rest in rows]


def seen_by(environment: Mapping[str, str], gpus: Sequence[str]) -> list[str]:
    """What a process started with `environment` sees of `gpus`: UUIDs by its ordinals.

    CUDA's own rules: numbers count in the driver's order, UUIDs may be shortened, and the list ends before the first
    entry that names none. Raises `ConfigError` for MIG instances, between which memory is not shared.
    """
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return list(gpus)
    found = []
    for name in (part.strip() for part in wanted.split(",")):
        if name.startswith("MIG-"):
            raise ConfigError(f"{name}: memory cannot be shared between MIG instances", hint="use whole GPUs")
        if name.isdecimal():
            at = int(name)
            matches = [gpus[at]] if at < len(gpus) else []
        else:
            matches = [gpu for gpu in gpus if name and gpu.startswith(name.removeprefix("GPU-"))]
        if len(matches) != 1:
            break
        found += matches
    return found
