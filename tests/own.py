"""Resources of one test process on a machine that several share: node names, ports, and processes that end with it.

Nodes with the same name remove each other's remains, in /dev/shm and among processes. So tests that kill nodes, or
count what they leave, need names that no other live test process has, in the same run or another.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["free_port", "guarded", "named"]

GUARD = Path(__file__).with_name("guard.py")
MARK = "WEIGHTSYNC_TEST_PROCESS"  # in the environment of everything that is started from here
PORTS = range(20_000, 32_000, 200)  # below the kernel's ephemeral ports


@functools.cache
def _claim() -> tuple[int, socket.socket]:
    """Return the lowest number that no other test process has, and the socket that holds it until its holders end."""
    for number in range(len(PORTS)):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0weightsync-tests-{number}")
        except OSError:
            claim.close()
        else:
            return number, claim
    raise RuntimeError(f"{len(PORTS)} processes run these tests already")


def named(stem: str) -> str:
    """Return the name of this process's node, bridge or file called `stem`.

    A later run uses the same numbers. So its daemons remove what an interrupted run has left in /dev/shm.
    """
    return f"{stem}-{_claim()[0]}"


@functools.cache
def _ports() -> Iterator[int]:
    first = PORTS[_claim()[0]]
    return itertools.cycle(range(first, first + PORTS.step))


def free_port() -> int:
    """Return a free port of this process's own range. No other process gets it by chance while its server restarts."""
    for port in itertools.islice(_ports(), PORTS.step):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is free")


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """End processes that are started in the block with the block, or however this process ends; stopped ones, too."""
    _, claim = _claim()
    before = dict(os.environ)
    mark = f"{os.getpid()}-{os.urandom(4).hex()}"
    # The guard holds the claim while it lives, so that no process gets the number before the guard is done.
    guard = subprocess.Popen(
        [sys.executable, str(GUARD), f"{MARK}={mark}"],
        stdin=subprocess.PIPE,
        pass_fds=(claim.fileno(),),
        env=before,
        start_new_session=True,
    )
    os.environ[MARK] = mark
    try:
        yield
    finally:
        del os.environ[MARK]
        guard.communicate(timeout=20)
