"""Several runs of these tests may be under way on one machine: which of what is found here is another's."""

from __future__ import annotations

import contextlib
import os

import psutil

__all__ = ["foreign_segments"]


def foreign_segments(names: set[str]) -> set[str]:
    """Of these arenas in /dev/shm, those whose bridge lives and was started by another run."""
    foreign = set()
    for process in psutil.process_iter() if names else ():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if "weightsync.nccl_bridge" not in words:
                continue
            ancestors = {parent.pid for parent in process.parents()}
            if process.ppid() != 1 and os.getpid() not in ancestors:
                incarnation = words[words.index("--incarnation") + 1]
                foreign |= {name for name in names if name.endswith(incarnation)}
    return foreign
