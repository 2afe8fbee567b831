"""Compares packages installed where an engine runs with those here. Reads files, and imports nothing."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from contextlib import suppress
from pathlib import Path

from weightsync.adapters.base import Finding

__all__ = ["examine_environment", "installed", "packages_of"]

_PACKAGES = re.compile(r"weightsync|torch|nvidia-nccl-cu\d\d|cupy-cuda\w+|vllm|sglang")
_TORCH = re.compile(r"(/\S*/(?:site|dist)-packages)/torch/lib/lib(?:torch|c10)\w*\.so")


def examine_environment(pid: int, proc: Path = Path("/proc")) -> list[Finding]:
    """Compare the engine's packages with those here. No findings if its files are hidden or it has loaded no torch."""
    folder = packages_of(pid, proc)
    theirs = installed([folder]) if folder is not None else {}
    if not theirs:
        return []
    ours = installed()
    where, found = f"the engine (pid {pid})", []
    if "weightsync" in theirs and theirs["weightsync"] != ours.get("weightsync"):
        what = f"{where} has weightsync {theirs['weightsync']}, and this is {ours.get('weightsync', 'another')}"
        fix = "the same version in both environments, then restart the engine"
        found.append(Finding(level="warn", what=what, fix=fix))
    listed = ", ".join(f"{name} {version}" for name, version in sorted(theirs.items()))
    differ = [f"{name} {ours[name]}" for name in sorted(theirs.keys() & ours.keys()) if theirs[name] != ours[name]]
    here = f"; here: {', '.join(differ)}" if differ else ""
    return [*found, Finding(level="ok", what=f"{where} runs with {listed}{here}")]


def packages_of(pid: int, proc: Path = Path("/proc")) -> Path | None:
    """Return the folder that the process's torch was loaded from, as seen from here; works for containers too."""
    with suppress(OSError):
        maps = (proc / str(pid) / "maps").read_text(errors="replace")
        if (found := _TORCH.search(maps)) is not None:
            folder = proc / str(pid) / "root" / found[1].lstrip("/")
            return folder if folder.is_dir() else None
    return None


def installed(folders: list[Path] | None = None) -> dict[str, str]:
    """Return the versions of packages that matter to a push, in `folders`; None: in this Python."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions(path=sys.path if folders is None else [*map(str, folders)]):
        name = re.sub(r"[-_.]+", "-", distribution.name or "").lower()
        if _PACKAGES.fullmatch(name):
            found.setdefault(name, distribution.version)
    return found
