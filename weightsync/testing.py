"""Public helpers for tests, here and in other projects: a manual clock, leak checks, the suite for transports.

This module does not need pytest. To check a transport of your own, call

    check_transport(make_pair)

where `make_pair(readers, slots, slot_bytes)` is a context manager that yields a `TransportPair`.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from weightsync.ipc.segments import DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from weightsync.transports.conformance_kit import MakePair

__all__ = ["LEAK_SECONDS", "ManualClock", "check_transport", "eventually", "no_leaks", "transport_checks"]

LEAK_SECONDS = 5.0  # for a thread or a socket to end after it was told to


class ManualClock:
    """A clock that moves only when told to. Call it like `time.monotonic`."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now  # seconds

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> float:
        """Let `seconds` (not negative) pass; returns the new time."""
        if seconds < 0:
            raise ValueError("time does not run backwards")
        self.now += seconds
        return self.now


def eventually(condition: Callable[[], bool], *, seconds: float = 10.0) -> bool:
    """Whether `condition`, called every 5 ms, becomes true within `seconds`."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        if time.monotonic() >= deadline:
            return False
        pause.wait(0.005)
    return True


@contextmanager
def no_leaks(*, directory: str = DIRECTORY) -> Iterator[None]:
    """Raise `AssertionError` if the block leaves behind files or threads of this process, or arenas in `directory`.

    They have `LEAK_SECONDS` to go away. Code that loads modules or starts pools should have run once before.
    """
    files, threads, arenas = _files(), _threads(), _arenas(directory)
    yield

    def left() -> list[str]:
        gc.collect()
        found = [f"file {number}: {link}" for number, link in _files().items() if files.get(number) != link]
        found += [f"arena {name}" for name in _arenas(directory) - arenas]
        extra = _threads() - threads
        return found + ([f"{extra} threads: {', '.join(t.name for t in threading.enumerate())}"] if extra > 0 else [])

    if not eventually(lambda: not left(), seconds=LEAK_SECONDS):
        raise AssertionError(f"left behind: {'; '.join(left())}")


def transport_checks() -> tuple[str, ...]:
    """Return the names of the checks that `check_transport` runs."""
    from weightsync.transports.conformance import CHECKS

    return tuple(CHECKS)


def check_transport(make_pair: MakePair, *, only: str | None = None, directory: str = DIRECTORY) -> None:
    """Run every conformance check of transports (or the one called `only`) against pairs made by `make_pair`.

    Each check gets pairs of its own and must leave no file, thread or arena (in `directory`) behind. Raises
    `AssertionError`, or the transport's own error, with a note that names the check.
    """
    from weightsync.transports.conformance import CHECKS, warm_up

    warm_up(make_pair)
    for name, check in CHECKS.items():
        if only not in (None, name):
            continue
        try:
            with no_leaks(directory=directory):
                check(make_pair)
        except BaseException as error:
            error.add_note(f"in the transport check {name!r}: {check.__doc__}")
            raise


def _files() -> dict[str, str]:
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed by now, such as the descriptor that lists the directory
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return found


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _arenas(directory: str) -> set[str]:
    return {name for name in os.listdir(directory) if name.startswith("weightsync-")}
