"""What is a test process's own on a machine that several share: names of nodes, ports, and processes that end with it.

Nodes of one name clear up after each other, in /dev/shm and among processes: tests that kill them, or count what they
leave, need names that no other test process has which lives at that time, of the same run or of another.
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
PORTS = range(20_000, 32_000, 200)  # below those that the kernel gives to whoever asks for any


@functools.cache
def _claim() -> tuple[int, socket.socket]:
    """The lowest number that no other test process has, and what holds it: the kernel lets go of that at the end."""
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
    """The name of this process's node, bridge or file called `stem`. The same number comes back in a later run, whose
    daemons thus remove what an interrupted one has left in /dev/shm.
    """
    return f"{stem}-{_claim()[0]}"


@functools.cache
def _ports() -> Iterator[int]:
    first = PORTS[_claim()[0]]
    return itertools.cycle(range(first, first + PORTS.step))


def free_port() -> int:
    """A port of this process's own range: nobody else gets it by chance while who listens there restarts."""
    for port in itertools.islice(_ports(), PORTS.step):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is free")


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """What is started in the block ends with it or, however that ends, with this process: what stands still, too."""
    _, claim = _claim()
    before = dict(os.environ)
    mark = f"{os.getpid()}-{os.urandom(4).hex()}"
    # The guard holds the claim as long as it lives: nobody gets the number before it has done.
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
