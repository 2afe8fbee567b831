"""Tells the shared memory of other test processes apart: several share one run, and several runs share a machine."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil

__all__ = ["foreign_segments"]


def foreign_segments(names: set[str]) -> set[str]:
    """Return those of these files in /dev/shm that a process not started from here has open or mapped."""
    if not names:
        return set()
    foreign: set[str] = set()
    mine = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    for process in psutil.process_iter():
        orphan = False
        with contextlib.suppress(psutil.Error):
            orphan = process.ppid() == 1  # its parent may be a daemon that a test from here has killed
        if process.pid not in mine and not orphan:
            foreign |= names & _held(process.pid)
    return foreign


def _held(pid: int) -> set[str]:
    """Return the names of files in /dev/shm that a process has open or mapped, as far as this user may see."""
    held: set[str] = set()
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
        held |= {line.rpartition("/dev/shm/")[2] for line in lines if "/dev/shm/" in line}
    with contextlib.suppress(OSError):
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                held.add(os.readlink(f"/proc/{pid}/fd/{descriptor}").removeprefix("/dev/shm/"))
    return held
