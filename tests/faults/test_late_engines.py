"""What was pushed last is kept, and engines that come late, restart or are left torn get it without a trainer."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.faults.conftest import populated
from tests.faults.kit import ARENA, TIMEOUTS, Node, kill_tree, until
from tests.own import named
from weightsync.config import EngineConfig
from weightsync.fleet import Fleet
from weightsync.operator import change_engines

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightsync.fleet import Engine


class Late(Node):
    """Two nodes, of which the first keeps what it pushes."""

    @property
    def kept(self) -> int | None:
        version: int | None = self.status().kept.get("default")
        return version

    def keeper(self) -> psutil.Process:
        """Its process."""
        children = psutil.Process(self.daemon.pid).children()
        return next(child for child in children if "weightsync.keeper" in child.cmdline())

    def restart(self, engine: Engine) -> None:
        """The engine dies, and comes back with what it was started on."""
        kill_tree(engine)
        self.fleet.restart_engine(engine)

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """The daemon that would push again stands still: what the block has done is there when it looks."""
        self.daemon.kill(signal.SIGSTOP)
        try:
            yield
        finally:
            self.daemon.kill(signal.SIGCONT)

    def wait_keeper(self) -> None:
        """Return once it runs: it is started anew where it was lost."""

        def runs() -> bool:
            return self.ready() in [f"pid={child.pid}" for child in psutil.Process(self.daemon.pid).children()]

        until(runs, "the keeper runs")

    def ready(self) -> str:
        """The keeper that was ready last, as the log has it."""
        return self.daemon.log.read_text().rpartition("keeper.ready ")[2].split("\n")[0]

    def wait_version(self, engine: Engine, version: int) -> None:
        def serves() -> bool:
            info = self.info(engine)
            return (info["weight_version"], info["paused"], info["torn"]) == (version, False, False)

        until(serves, f"{engine.name} serves version {version}")

    def everybody_serves(self, name: str, version: int) -> None:
        for engine in self.engines:
            self.wait_version(engine, version)
            self.serves(engine, name)


@pytest.fixture(scope="module")
def _fleet() -> Iterator[Late]:
    with Fleet() as fleet:
        engines, trainer = populated(fleet, home=1, away=2)
        log = {"level": "debug"}
        away = fleet.start_daemon(named("late2"), engines[1:], arena=ARENA, timeouts=TIMEOUTS, log=log)
        home = fleet.start_daemon(
            named("late1"), engines[:1], peers=[away], arena=ARENA, timeouts=TIMEOUTS, log=log, node={"retain": "host"}
        )
        made = Late(fleet, home, engines, trainer, [away])
        made.wait_attached()
        yield made
        for daemon in (home, away):
            assert "Traceback" not in daemon.log.read_text()


@pytest.fixture
def late(_fleet: Late) -> Iterator[Late]:
    """Its engines serve checkpoint B, which is kept; they do so again after each test."""
    _fleet.wait_idle()
    _fleet.wait_attached()
    _fleet.wait_keeper()
    report = _fleet.push("B")
    assert report.complete
    assert {engine.engine for engine in report.engines} == {"home", "away"}, "who keeps it is no engine"
    until(lambda: _fleet.kept == report.version, "it is kept")
    _fleet.before = "B"
    yield _fleet
    for rank in _fleet.ranks:
        rank.close()
    _fleet.ranks.clear()
    _fleet.clear()


@pytest.mark.parametrize("where", [0, 1])
def test_an_engine_that_restarts_is_brought_up_to_date(late, where):
    version = late.kept
    late.restart(late.engines[where])
    late.everybody_serves("B", version)
    late.wait_log("repeat.complete")


def test_an_engine_that_joins_is_brought_up_to_date(late):
    engine = late.fleet.start_engine("young", late.fleet.root / "A")
    added = EngineConfig(name="young", kind="reference", url=engine.url)
    try:
        (status,) = change_engines(late.daemon.endpoint, add=(added,))
        assert status.state == "blank"
        late.wait_version(engine, late.kept)
        late.serves(engine, "B")
    finally:
        change_engines(late.daemon.endpoint, remove=("young",))
        late.fleet.end(engine)


def test_engines_that_a_failed_push_left_torn_go_back_to_what_was_pushed_last(late):
    version = late.kept
    ranks = late.start_ranks(2)
    late.push_all(ranks, late.next_version(), only={1: {"gate": ["read", 6]}})
    ranks[1].wait_at("read")
    for engine in late.engines:
        late.wait_torn(engine)
    ranks[1].kill()
    assert "torn and paused: home, away" in ranks[0].error()["message"] or late.status().last_error is not None
    late.everybody_serves("B", version)
    until(lambda: late.kept == version, "it is kept still")


def test_a_push_that_is_called_during_a_repeat_waits_for_it(late):
    home = late.engines[0]
    with late.standing():
        late.restart(home)
        late.delay(home, "/finish")
    until(lambda: late.push_state() is not None, "it is pushed again")
    (rank,) = late.start_ranks(1)
    version = late.next_version()
    late.push_all([rank], version)
    late.wait_log("rank 0 waits")
    late.clear()
    assert rank.report()["complete"]
    late.everybody_serves("C", version)


def test_what_engines_read_in_place_is_kept_through_slots(late):
    (rank,) = late.start_ranks(1)
    version = late.next_version()
    late.push_all([rank], version, in_place=True)
    report = rank.report()
    assert report["complete"]
    assert {e["engine"]: e["drawn"] for e in report["engines"]} == {"home": True, "away": True}
    until(lambda: late.kept == version, "it is kept")
    late.restart(late.engines[0])
    late.everybody_serves("C", version)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_keeper_that_is_lost_in_a_push_costs_nobody_the_push(late, number):
    keeper = late.keeper()
    (rank,) = late.start_ranks(1)
    version = late.next_version()
    late.push_all([rank], version, only={0: {"gate": ["read", 4]}})
    rank.wait_at("read")
    keeper.send_signal(number)
    rank.go()
    report = rank.report()
    assert report["complete"]
    assert report["seconds"] < 10
    until(lambda: not keeper.is_running(), "it is gone")
    assert late.kept is None
    late.everybody_serves("C", version)


def test_a_keeper_that_dies_between_pushes_is_started_anew(late):
    keeper = late.keeper()
    os.kill(keeper.pid, signal.SIGKILL)
    keeper.wait(10)
    assert late.kept is None
    until(lambda: late.ready() != f"pid={keeper.pid}", "another runs")
    report = late.push("A")
    assert report.complete
    until(lambda: late.kept == report.version, "it is kept")
    assert late.keeper().pid != keeper.pid


def test_a_repeat_that_fails_is_tried_again(late):
    version = late.kept
    home = late.engines[0]
    with late.standing():
        late.restart(home)
        late.order(home, fail={"endpoint": "/begin", "times": 1})
    late.wait_log("repeat.failed")
    late.everybody_serves("B", version)


def test_what_is_kept_ends_with_the_daemon(late):
    keeper = late.keeper()
    late.daemon.kill()
    keeper.wait(10)
    late.fleet.restart_daemon(late.daemon)
    late.wait_attached()
    assert late.kept is None
