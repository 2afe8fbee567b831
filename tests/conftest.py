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
    phases=[phase for phase in Phase if phase is not Phase.explain],  # explaining takes longer than a test may
    derandomize=True,  # every change is judged by the same examples; `make test-all` looks for more
)
settings.register_profile("weightsync-random", settings.get_profile("weightsync"), derandomize=False)
settings.load_profile("weightsync")

# Two test processes share few cores, and torch in each of their processes would spin on all of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell has its background processes ignore SIGINT, and so do their children; but tests send it to processes.
signal.signal(signal.SIGINT, signal.default_int_handler)


PROCESSES = [Path(__file__).with_name(name) for name in ("e2e", "faults")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests with engines and daemons 300 seconds: the limit is only there for tests that hang.

    A first test also pays for its module's fixtures, and may take a minute when two test processes share few cores.
    """
    for item in items:
        if any(folder in item.path.parents for folder in PROCESSES) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(300))


@pytest.fixture(scope="session", autouse=True)
def _guard():
    """End all processes that tests started when the test process ends."""
    with guarded():
        yield


def _open_fds() -> dict[str, str]:
    fds = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            fds[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue  # it was the descriptor of the listing itself
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

    # Processes that were told to end may take their time.
    assert eventually(lambda: not new_children(), seconds=10), f"left processes: {new_children()}"
    # A leak stays. Segments of other test processes are at times held by no process; new ones from now on are theirs.
    made = _segments() - segments
    assert eventually(lambda: not _left(made), seconds=10), f"left shared memory: {_left(made)}"
    assert eventually(lambda: not new_threads(), seconds=10), f"left threads: {new_threads()}"

    def new_fds() -> dict[str, str]:
        return {fd: what for fd, what in _open_fds().items() if fd not in fds}

    # An earlier test's idle connection to a daemon that has ended tries to reconnect from time to time.
    assert eventually(lambda: not new_fds(), seconds=10), f"left file descriptors: {new_fds()}"


@pytest.fixture
def unused_port() -> int:
    """A TCP port on loopback that no process listens on right now."""
    return free_port()
