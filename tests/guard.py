"""Kills all processes that a test process started, once it has ended: `python guard.py NAME=VALUE`.

The guard's stdin is a pipe from the test process. That process may end by SIGKILL or a pytest timeout, and processes
that it has stopped would then stay for ever. All its descendants, in any session or group, have NAME=VALUE in their
environment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

_SECONDS = 10.0  # for all processes to be gone


def marked(mark: bytes) -> list[int]:
    """Return the pids of living processes with the mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def main(mark: str) -> None:
    sys.stdin.buffer.read()  # returns once every writer has ended
    deadline = time.monotonic() + _SECONDS
    while (pids := marked(mark.encode())) and time.monotonic() < deadline:  # one may just have started another
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


if __name__ == "__main__":
    main(sys.argv[1])
