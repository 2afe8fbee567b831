"""The daemon's side of its bridges, with real bridge processes."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from functools import wraps
from typing import TYPE_CHECKING

import psutil
import pytest

import weightsyncd.bridge_link
from weightsync.errors import (
    ConfigError,
    LocalProtocolError,
    TransportBroken,
    TransportClosed,
    TransportTimeout,
    WeightSyncError,
)
from weightsync.ipc.arena import Arena
from weightsync.ipc.segments import segment_name
from weightsync.nccl_bridge import commands as c
from weightsync.nccl_bridge import frames
from weightsync.processes import started
from weightsync.testing import eventually, no_leaks
from weightsyncd.bridges import Bridge, BridgeConfig, kill_orphans

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def nothing_left(tmp_path):
    """No file, thread or process of this test outlives it, and no arena in its directory."""
    children = {child.pid for child in psutil.Process().children()}
    with no_leaks(directory=str(tmp_path)):
        yield
    assert {child.pid for child in psutil.Process().children()} <= children


def _soon(seconds: float = 20) -> float:
    return time.monotonic() + seconds


def run(test):
    """An asyncio test, without a plugin."""

    @wraps(test)
    def runner(*args: object, **kwargs: object) -> None:
        asyncio.run(test(*args, **kwargs))

    return runner


@pytest.fixture
def config(tmp_path):
    return BridgeConfig(node="n", index=0, slots=2, slot_bytes=4096, directory=str(tmp_path), log_level="error")


class Watched:
    """A bridge that is up, and what it told."""

    def __init__(self, config: BridgeConfig) -> None:
        self.lost: list[WeightSyncError] = []
        self.readied: list[str | None] = []
        self._lost = asyncio.Event()
        self._ready = asyncio.Event()
        self.bridge = Bridge(
            config,
            on_lost=self._note,
            on_ready=self.note_ready,
        )

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send a signal to the bridge; returns its pid."""
        pid = self.bridge.pid
        assert pid is not None
        os.kill(pid, number)
        return pid

    async def until_lost(self) -> None:
        async with asyncio.timeout(20):
            await self._lost.wait()

    async def until_ready(self) -> None:
        """Until it is ready again."""
        async with asyncio.timeout(20):
            await self._ready.wait()

    def note_ready(self, bridge: Bridge) -> None:
        self.readied.append(bridge.incarnation)
        self._ready.set()

    def _note(self, bridge: Bridge, error: WeightSyncError) -> None:
        assert bridge is self.bridge
        self.lost.append(error)
        self._lost.set()


@asynccontextmanager
async def _up(config: BridgeConfig):
    watched = Watched(config)
    await watched.bridge.start(deadline=_soon())
    try:
        yield watched
    finally:
        await watched.bridge.stop(deadline=_soon(5))
        assert watched.bridge.state == "stopped"
        assert _arenas(config) == []


def _arenas(config: BridgeConfig) -> list[str]:
    start = f"weightsync-{os.geteuid()}-{config.node}-{config.index}-"
    return [name for name in os.listdir(config.directory) if name.startswith(start)]


@run
async def test_start_call_stop(config):
    async with _up(config) as watched:
        bridge = watched.bridge
        assert (bridge.name, bridge.state, bridge.restarts, bridge.last_error) == ("n/0", "ready", 0, None)
        assert bridge.offer is not None
        with Arena.attach(bridge.offer, writable=True) as arena:
            assert arena.name == segment_name("n", 0, bridge.incarnation or "")
        offered = await bridge.call(c.Offer(reader="e/0"), deadline=_soon())
        assert offered.offer
        answers = await asyncio.gather(*(bridge.call(c.Pending(slot=i % 2), deadline=_soon()) for i in range(50)))
        assert answers == [c.PendingReaders(readers=())] * 50
        status = bridge.status()
        assert (status.pid, status.incarnation, status.state) == (bridge.pid, bridge.incarnation, "ready")
        with pytest.raises(LocalProtocolError):
            await bridge.start(deadline=_soon())
    assert watched.lost == []
    assert (bridge.pid, bridge.incarnation, bridge.offer) == (None, None, None)
    await bridge.stop(deadline=_soon())
    with pytest.raises(TransportClosed):
        await bridge.call(c.Hello(), deadline=_soon())
    with pytest.raises(TransportClosed):
        await bridge.ready(deadline=_soon())
    await bridge.start(deadline=_soon())
    await bridge.stop(deadline=_soon(-1))  # no time to be graceful


@run
async def test_errors_of_the_bridge_are_raised_here(config):
    async with _up(config) as watched:
        with pytest.raises(LocalProtocolError, match="no slot 7"):
            await watched.bridge.call(c.Pending(slot=7), deadline=_soon())
        await watched.bridge.call(c.Offer(reader="e/0"), deadline=_soon())
        await watched.bridge.call(c.Export(slot=0, nbytes=1, sequence=1, readers=("e/0",)), deadline=_soon())
        with pytest.raises(TransportTimeout, match="held by e/0"):
            await watched.bridge.call(c.AwaitReleased(slot=0, readers=("e/0",)), deadline=_soon(0.3))
        with pytest.raises(TransportTimeout):
            await watched.bridge.call(c.Hello(), deadline=_soon(-1))
        for command in (c.Pending(slot=-1), c.Receive(ticket=bytes(frames.MAX_FRAME), slot=0)):
            with pytest.raises(LocalProtocolError, match="cannot be sent"):
                await watched.bridge.call(command, deadline=_soon())
    assert watched.lost == [], "a bridge that answers in time is not wedged"


@run
async def test_a_bridge_that_is_killed_is_restarted(config):
    async with _up(config) as watched:
        bridge = watched.bridge
        before, old = bridge.incarnation, bridge.offer
        assert old is not None
        await bridge.call(c.Offer(reader="e/0"), deadline=_soon())
        await bridge.call(c.Export(slot=0, nbytes=1, sequence=1, readers=("e/0",)), deadline=_soon())
        calls = [
            asyncio.create_task(bridge.call(c.AwaitReleased(slot=0, readers=("e/0",)), deadline=_soon()))
            for _ in range(2)
        ]
        await asyncio.sleep(0)
        watched.kill()
        for call in calls:
            with pytest.raises(TransportBroken, match="n/0"):
                await call
        await bridge.ready(deadline=_soon())
        assert bridge.incarnation != before
        assert (bridge.restarts, watched.readied) == (1, [bridge.incarnation])
        assert [str(error) for error in watched.lost] == [bridge.last_error.message if bridge.last_error else None]
        assert "signal 9" in str(watched.lost[0])
        with pytest.raises(TransportBroken):
            Arena.attach(old, writable=True)
        assert await bridge.call(c.Pending(slot=0), deadline=_soon()) == c.PendingReaders(readers=())


@run
async def test_a_bridge_that_is_stopped_is_killed_at_the_deadline_and_restarted(config):
    async with _up(config) as watched:
        bridge = watched.bridge
        await bridge.call(c.Hello(), deadline=_soon())
        pid = watched.kill(signal.SIGSTOP)
        other = asyncio.create_task(bridge.call(c.Hello(), deadline=_soon(60)))
        start = time.monotonic()
        with pytest.raises(TransportTimeout, match="did not answer Ledger"):
            await bridge.call(c.Ledger(), deadline=_soon(1.1))
        assert time.monotonic() - start < 5
        with pytest.raises(TransportBroken, match="wedged"):
            await other
        with pytest.raises(TransportBroken, match="restarted"):
            await bridge.call(c.Hello(), deadline=_soon())
        await bridge.ready(deadline=_soon())
        assert bridge.pid != pid
        assert not psutil.pid_exists(pid), "it was not reaped"
        assert "wedged" in watched.lost[0].message


@run
async def test_a_call_in_a_hurry_does_not_kill_a_bridge(config):
    async with _up(config) as watched:
        pid = watched.bridge.pid
        for _ in range(20):
            with pytest.raises(TransportTimeout):
                await watched.bridge.call(c.Ledger(), deadline=time.monotonic() + 1e-6)
        await watched.bridge.call(c.Ledger(), deadline=_soon())
        await asyncio.sleep(1.1)  # longer than the time that a late answer has
        assert watched.bridge.pid == pid


@run
async def test_a_call_that_is_cancelled_leaves_the_bridge_alone(config):
    async with _up(config) as watched:
        call = asyncio.create_task(watched.bridge.call(c.Ledger(), deadline=_soon()))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await watched.bridge.call(c.Hello(), deadline=_soon())


@run
async def test_start_says_what_is_wrong_and_leaves_nothing(config, tmp_path):
    space = os.statvfs("/dev/shm")
    large = BridgeConfig(
        node="toolarge", index=0, slots=2, slot_bytes=space.f_blocks * space.f_frsize, log_level="error"
    )
    bridge = Bridge(large)
    with pytest.raises(ConfigError, match=r"arena\.slot_bytes"):
        await bridge.start(deadline=_soon())
    assert bridge.state == "stopped"
    assert bridge.last_error is not None
    assert _arenas(large) == []


@run
async def test_a_restart_that_fails_is_tried_again(config, tmp_path):
    async with _up(config) as watched:
        bridge = watched.bridge
        hidden = tmp_path.with_name("hidden")
        tmp_path.rename(hidden)
        watched.kill()
        await watched.until_lost()
        async with asyncio.timeout(20):
            while bridge.last_error is None or bridge.last_error.kind != "ConfigError":  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        with pytest.raises(TransportTimeout, match="No such file"):
            await bridge.ready(deadline=_soon(0.1))
        assert bridge.state == "lost"
        tmp_path.mkdir()
        await bridge.ready(deadline=_soon())
        assert bridge.restarts == 1
        shutil.rmtree(hidden)


@run
async def test_stopping_while_it_restarts(config):
    watched = Watched(config)
    await watched.bridge.start(deadline=_soon())
    watched.kill()
    await watched.until_lost()
    await watched.bridge.stop(deadline=_soon(5))
    assert watched.bridge.state == "stopped"
    assert eventually(lambda: _arenas(config) == [])


@run
async def test_stopping_while_it_starts(config):
    watched = Watched(config)
    starting = asyncio.create_task(watched.bridge.start(deadline=_soon()))
    await asyncio.sleep(0)
    await watched.bridge.stop(deadline=_soon())
    with pytest.raises(TransportClosed):
        await starting
    assert (watched.bridge.state, watched.bridge.pid, _arenas(config)) == ("stopped", None, [])
    starting = asyncio.create_task(watched.bridge.start(deadline=_soon()))
    for _ in range(3):
        await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert watched.bridge.state == "stopped"
    assert eventually(lambda: _arenas(config) == [])


@run
async def test_a_listener_with_a_bug_does_not_end_the_supervision(config, caplog):
    watched = Watched(config)
    watched.bridge = Bridge(config, on_lost=lambda bridge, error: [][0], on_ready=watched.note_ready)
    await watched.bridge.start(deadline=_soon(float("inf")))
    watched.kill()
    await watched.until_ready()
    assert "a callback failed" in caplog.text
    await watched.bridge.stop(deadline=_soon())


@run
async def test_a_stopped_process_does_not_hold_up_stop(config):
    watched = Watched(config)
    await watched.bridge.start(deadline=_soon())
    pid = watched.kill(signal.SIGSTOP)
    start = time.monotonic()
    await watched.bridge.stop(deadline=_soon(0.3))
    assert time.monotonic() - start < 5
    assert not psutil.pid_exists(pid)
    assert _arenas(config) == []


@run
async def test_two_bridges_of_one_node_do_not_touch_each_other(config, tmp_path):
    second = BridgeConfig(node="n", index=1, slots=1, slot_bytes=4096, directory=str(tmp_path), log_level="error")
    other = Watched(second)
    await other.bridge.start(deadline=_soon())
    async with _up(config) as watched:
        watched.kill()
        await watched.until_lost()
        await watched.bridge.ready(deadline=_soon())
        assert other.bridge.offer is not None
        Arena.attach(other.bridge.offer, writable=True).close()
        await other.bridge.stop(deadline=_soon(5))


@run
async def test_ctrl_c_on_the_terminal_does_not_reach_it(config):
    async with _up(config) as watched:
        assert os.getsid(watched.bridge.pid or 0) != os.getsid(0)


def _start_by_hand(directory: Path, node: str, daemon: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            shlex.split(
                f"{sys.executable} -m weightsync.nccl_bridge --fd {theirs.fileno()} --node {node} --index 0 "
                f"--incarnation 0123456789abcdef --shm-dir {directory} --slots 1 --slot-bytes 4096 "
                f"--daemon '{daemon}' --log-level error"
            ),
            pass_fds=(theirs.fileno(),),
            env=os.environ | {"PYTHONPATH": os.getcwd()},
        )
    assert eventually(lambda: bool(list(directory.glob(f"weightsync-*-{node}-0-*"))))
    return process, ours


@pytest.mark.parametrize("daemon", ["dead", "reused", "unknown"])
def test_orphans_are_ended(tmp_path, daemon):
    mine = os.getpid()
    name = {"dead": "4194305:1", "reused": f"{mine}:{int(started(mine)) - 1}", "unknown": ""}[daemon]
    process, pipe = _start_by_hand(tmp_path, "orphaned", name)
    os.kill(process.pid, signal.SIGSTOP)
    pipe.close()  # as if the daemon had ended: a stopped bridge does not notice
    assert kill_orphans("other", str(tmp_path)) == 0
    assert kill_orphans("orphaned", str(tmp_path / "elsewhere")) == 0
    assert list(tmp_path.iterdir())
    assert kill_orphans("orphaned", str(tmp_path)) == 1
    assert process.wait(10) == -signal.SIGKILL
    assert not list(tmp_path.iterdir())
    assert kill_orphans("orphaned", str(tmp_path)) == 0


def test_bridges_of_a_living_daemon_are_left_alone(tmp_path):
    mine = os.getpid()
    process, pipe = _start_by_hand(tmp_path, "lively", f"{mine}:{started(mine)}")
    stale = tmp_path / segment_name("lively", 1, "f" * 16)
    stale.touch()
    assert kill_orphans("lively", str(tmp_path)) == 0
    assert process.poll() is None
    assert not stale.exists(), "an arena without a process was not removed"
    assert len(list(tmp_path.iterdir())) == 1
    pipe.close()
    assert process.wait(10) in (0, 1)


def test_when_a_process_started():
    assert int(started(os.getpid())) > 0
    assert started(4194305) == ""


def test_margins_leave_a_bridge_time_to_answer():
    assert 0 < weightsyncd.bridge_link._MARGIN < weightsyncd.bridge_link._FAIR
