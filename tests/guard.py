"""Kills what a test process has started, when that ends: `python guard.py NAME=VALUE`, with a pipe from it as stdin.

A test process may end without a word, by SIGKILL or a timeout of pytest, and what it has stopped would stand for ever.
All that it starts, in whatever session or group, has NAME=VALUE in its environment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

_SECONDS = 10.0  # for all of them to be gone


def marked(mark: bytes) -> list[int]:
    """Living processes with the mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def main(mark: str) -> None:
    sys.stdin.buffer.read()  # until nobody can write any more
    deadline = time.monotonic() + _SECONDS
    while (pids := marked(mark.encode())) and time.monotonic() < deadline:  # one of them may just have started another
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


if __name__ == "__main__":
    main(sys.argv[1])
