"""Shared by all tests: hypothesis without wall-clock limits, and a look at what a test leaves behind."""

from __future__ import annotations

import gc
import os
import signal
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.foreign import foreign_segments
from tests.own import free_port, guarded
from weightsync.testing import eventually

settings.register_profile(
    "weightsync",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[phase for phase in Phase if phase is not Phase.explain],  # which takes longer than a test may
    derandomize=True,  # what a change is judged by is the same for all; `make test-all` looks for more
)
settings.register_profile("weightsync-random", settings.get_profile("weightsync"), derandomize=False)
settings.load_profile("weightsync")

# Two processes share these tests on few cores, and each of theirs would have torch spin on all of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts what runs in its background deaf to Ctrl-C, and what that starts too: tests send it to processes.
signal.signal(signal.SIGINT, signal.default_int_handler)


PROCESSES = [Path(__file__).with_name(name) for name in ("e2e", "faults")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The limit of a test is there for one that hangs. Module fixtures count too: where they start engines and daemons,
    and two of these processes share few cores, a first test may well take a minute.
    """
    for item in items:
        if any(folder in item.path.parents for folder in PROCESSES) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(300))


@pytest.fixture(scope="session", autouse=True)
def _guard():
    """Nothing that a test starts outlives the process that runs it."""
    with guarded():
        yield


def _open_fds() -> dict[str, str]:
    fds = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            fds[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue  # it was the listing's own
    return fds


def _segments() -> set[str]:
    return {p.name for p in Path("/dev/shm").iterdir() if p.name.startswith("weightsync-")}


def _left(made: set[str]) -> set[str]:
    there = made & _segments()
    return there - foreign_segments(there)


@pytest.fixture
def no_leaks():
    """Fail a test that leaves file descriptors, threads, child processes or shared memory behind."""
    import psutil

    gc.collect()
    fds, threads, segments = _open_fds(), set(threading.enumerate()), _segments()
    children = {c.pid for c in psutil.Process().children(recursive=True)}
    yield
    gc.collect()

    def new_threads() -> set[str]:
        return {t.name for t in set(threading.enumerate()) - threads if t.is_alive()}

    def new_children() -> list[psutil.Process]:
        return [c for c in psutil.Process().children(recursive=True) if c.pid not in children]

    # What was told to end may take its time to.
    assert eventually(lambda: not new_children(), seconds=10), f"left processes: {new_children()}"
    # A leak stays. What other processes of these tests make is held by nobody at times; what comes now is theirs.
    made = _segments() - segments
    assert eventually(lambda: not _left(made), seconds=10), f"left shared memory: {_left(made)}"
    assert eventually(lambda: not new_threads(), seconds=10), f"left threads: {new_threads()}"

    def new_fds() -> dict[str, str]:
        return {fd: what for fd, what in _open_fds().items() if fd not in fds}

    # An idle line to a daemon that has ended, of some earlier test, tries now and then to reach it.
    assert eventually(lambda: not new_fds(), seconds=10), f"left file descriptors: {new_fds()}"


@pytest.fixture
def unused_port() -> int:
    """A TCP port on loopback that nobody listens on right now."""
    return free_port()
