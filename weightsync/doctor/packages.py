"""Checks whether the CUDA versions of cupy, torch and the driver fit. Imports neither, and makes no CUDA context."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path
from typing import NamedTuple

from weightsync.adapters.base import Finding
from weightsync.errors import ConfigError, install_hint
from weightsync.gpus import driver_cuda

__all__ = ["Cupy", "Torch", "examine_packages", "judge_packages"]

_MAJORS = (12, 13)  # CUDA versions that weightsync has an extra for


class Cupy(NamedTuple):
    """One installed distribution that holds cupy."""

    name: str
    version: str
    major: int | None  # of the CUDA it is made for; None if it was built from source


class Torch(NamedTuple):
    """The torch of this Python."""

    version: str
    cuda: tuple[int, int] | None  # CUDA version that it is built for; None: built for a CPU


def examine_packages() -> list[Finding]:
    """Compare this Python's cupy and torch with the driver's CUDA version. Calls nvidia-smi once."""
    try:
        driver, found = driver_cuda(), []
    except ConfigError as error:
        driver = None
        found = [
            Finding(level="warn", what=f"the driver's CUDA version is unknown: {error.message}", fix=error.hint or "")
        ]
    return found + judge_packages(installed_cupys(), installed_torch(), driver)


def judge_packages(cupys: list[Cupy], torch: Torch | None, driver: tuple[int, int] | None) -> list[Finding]:
    """Return what is wrong with these versions, or one finding that they fit.

    `driver` is the latest CUDA version that the driver runs, None if unknown.
    """
    where = f"for {sys.executable}"
    extra = install_hint(f"cuda{_best(torch, driver)}")
    found = _judge_torch(torch, driver)
    if not cupys:
        return [*found, Finding(level="fail", what=f"slots lie on GPUs, and no cupy is installed {where}", fix=extra)]
    if len(cupys) > 1:
        names = " ".join(cupy.name for cupy in cupys)
        what = f"{len(cupys)} distributions of cupy are installed {where}, one over the other: {names}"
        return [*found, Finding(level="fail", what=what, fix=f"pip uninstall -y {names}; then {extra}")]
    (cupy,) = cupys
    what = f"{cupy.name} {cupy.version}"
    if cupy.major is None:
        return [*found, Finding(level="ok", what=f"{what}, built from source: its CUDA version is not known here")]
    instead = f"pip uninstall -y {cupy.name}; then {extra}"
    if driver is not None and cupy.major > driver[0]:
        what = f"{what} needs CUDA {cupy.major}, and the driver runs CUDA up to {_dotted(driver)}"
        return [*found, Finding(level="fail", what=what, fix=f"{instead}; or a newer driver")]
    if torch is not None and torch.cuda is not None and torch.cuda[0] != cupy.major:
        what = f"{what} beside torch {torch.version} for CUDA {_dotted(torch.cuda)}: cupy compiles with CUDA "
        what += f"{cupy.major} libraries, which that torch does not bring along"
        return [*found, Finding(level="warn", what=what, fix=f"{instead}; or see that CUDA {cupy.major} is installed")]
    beside = f" beside torch for CUDA {_dotted(torch.cuda)}" if torch is not None and torch.cuda else ""
    runs = f"; the driver runs CUDA up to {_dotted(driver)}" if driver is not None else ""
    return [*found, Finding(level="ok", what=f"{what}{beside}{runs}")]


def _judge_torch(torch: Torch | None, driver: tuple[int, int] | None) -> list[Finding]:
    if torch is None:
        return []
    if torch.cuda is None:
        what = f"torch {torch.version} is built for a CPU: weightsyncd and its bridges do without, a trainer or engine "
        what += f"of {sys.executable} cannot work on GPUs"
        return [Finding(level="warn", what=what, fix="torch for CUDA, where trainers or engines use this Python")]
    if driver is not None and torch.cuda[0] > driver[0]:
        what = (
            f"torch {torch.version} is for CUDA {_dotted(torch.cuda)}, and the driver runs CUDA up to {_dotted(driver)}"
        )
        return [Finding(level="warn", what=what, fix=f"torch for CUDA {driver[0]}, or a newer driver")]
    return []


def _best(torch: Torch | None, driver: tuple[int, int] | None) -> int:
    """Return torch's CUDA version if the driver runs it, else the driver's, among those with an extra of weightsync."""
    most = driver[0] if driver is not None else _MAJORS[-1]
    wanted = torch.cuda[0] if torch is not None and torch.cuda is not None else most
    return max(_MAJORS[0], min(wanted, most, _MAJORS[-1]))


def installed_cupys() -> list[Cupy]:
    """Return every distribution of cupy in this Python. More than one is a fault: all bring the same package."""
    found = set()
    for distribution in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.name or "").lower()
        wheel = re.fullmatch(r"cupy-cuda(\d\d)\d?x?", name)
        if wheel is not None or name == "cupy":
            found.add(Cupy(name, distribution.version, int(wheel[1]) if wheel is not None else None))
    return sorted(found)


def installed_torch() -> Torch | None:
    """Return this Python's torch, read from its files; None if there is none."""
    spec = importlib.util.find_spec("torch")  # imports nothing
    if spec is None or not spec.submodule_search_locations:
        return None
    text = Path(spec.submodule_search_locations[0], "version.py").read_text(encoding="utf-8")
    version = re.search(r"^__version__\s*=\s*'([^']+)'", text, re.MULTILINE)
    cuda = re.search(r"^cuda\b[^=]*=\s*'(\d+)\.(\d+)", text, re.MULTILINE)
    return Torch(version[1] if version else "?", (int(cuda[1]), int(cuda[2])) if cuda else None)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
