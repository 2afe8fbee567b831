"""One node, and two pairs of nodes, for all fault tests: starting an engine takes seconds, breaking it does not."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.faults.kit import ARENA, TIMEOUTS, TINY, TRAINER, Node, segments, until
from tests.faults.leaders import all_is_well, daemons_of, two_leaders
from tests.own import free_port, named
from weightsync.adapters.reference.checkpoint import random_checkpoint
from weightsync.fleet import Fleet

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from weightsync.fleet import Child, Daemon, Engine


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to the report of a failed test what the daemons logged during it."""
    report = yield
    if report.failed and isinstance(item, pytest.Function):
        for node in item.funcargs.values():
            if isinstance(node, Node):
                for daemon in [node.daemon, *node.others]:
                    if daemon.log.exists():  # it is gone if the teardown after the last test failed
                        words = daemon.log.read_text(errors="replace")[node.marks.get(daemon.name, 0) :]
                        report.sections.append((f"log of {daemon.name}", words[-20_000:]))
    return report


def prepared(fleet: Fleet) -> None:
    """Make the checkpoints that are pushed."""
    for seed, name in enumerate("ABC"):
        random_checkpoint(TINY, fleet.root / name, seed)


def populated(fleet: Fleet, **sizes: int) -> tuple[list[Engine], Child]:
    """Make the checkpoints that are pushed. Start engines, by name and tp size, and a trainer that listens."""
    prepared(fleet)
    engines = [
        fleet.start_engine(name, fleet.root / "A", tp=tp, port=free_port(), flags=["--enable-faults"], wait=False)
        for name, tp in sizes.items()
    ]
    trainer = fleet.spawn("trainer", [str(TRAINER), str(fleet.root / "trainer.sock")])
    for engine in engines:
        fleet.wait_engine(engine)
    until((fleet.root / "trainer.sock").exists, "the trainer listens", 30)
    return engines, trainer


@pytest.fixture(scope="session")
def _one_node() -> Iterator[Node]:
    with Fleet() as fleet:
        engines, trainer = populated(fleet, e1=1, e2=2)
        # With this `liveness`, a lost rank is noticed long before an engine's operation times out (`operation`). It can
        # be short: the daemon has no peers, and ranks that are at work have three times as long.
        timeouts, log = {**TIMEOUTS, "liveness": 1.5}, {"level": "debug"}
        daemon = fleet.start_daemon(named("fault0"), engines, arena=ARENA, timeouts=timeouts, log=log)
        yield Node(fleet, daemon, engines, trainer)
        no_surprises(daemon)
    assert not segments(daemon.name)


@contextmanager
def two_nodes(ours: str, theirs: str, **sizes: int) -> Iterator[Node]:
    """Daemons `ours`, which has the first engine and the trainer, and `theirs`, which has the other engines."""
    with Fleet() as fleet:
        engines, trainer = populated(fleet, **sizes)
        # a push gives a bridge half of `operation` to load torch, which takes two seconds or more beside another test
        timeouts, log = {**TIMEOUTS, "operation": 12}, {"level": "debug"}
        away = fleet.start_daemon(named(theirs), engines[1:], arena=ARENA, timeouts=timeouts, log=log)
        home = fleet.start_daemon(named(ours), engines[:1], peers=[away], arena=ARENA, timeouts=timeouts, log=log)
        node = Node(fleet, home, engines, trainer, [away])
        node.wait_attached()
        yield node
        no_surprises(home, away)
    assert not segments(home.name) | segments(away.name)


@pytest.fixture(scope="session")
def _two_nodes() -> Iterator[Node]:
    with two_nodes("fault1", "fault2", home=1, away1=1, away2=2) as node:
        yield node


def no_surprises(*daemons: Daemon) -> None:
    """Assert that the daemons logged no traceback."""
    for daemon in daemons:
        words = daemon.log.read_text()
        assert "Traceback" not in words, words[words.index("Traceback") - 500 :]
        assert "never retrieved" not in words


@pytest.fixture
def pair(_two_nodes: Node) -> Iterator[Node]:
    """Two nodes: the engine `home` on the trainer's, `away1` and `away2` behind another daemon. Otherwise as `node`."""
    yield from tried(_two_nodes)


@pytest.fixture
def node(_one_node: Node) -> Iterator[Node]:
    """One node with two engines, which serve checkpoint `node.before`. The next push mends what a test does to it."""
    yield from tried(_one_node)


@pytest.fixture(scope="session")
def _leaders() -> Iterator[Node]:
    with two_leaders(prepared, no_surprises) as node:
        yield node


@pytest.fixture
def leaders(_leaders: Node) -> Iterator[Node]:
    """Two nodes that are each other's peers, with trainers that push on either; see `tests/faults/leaders.py`."""
    _leaders.marks = {daemon.name: _leaders.log_length(daemon) for daemon in daemons_of(_leaders)}
    yield _leaders
    all_is_well(_leaders)


def tried(node: Node) -> Iterator[Node]:
    """Lend a node to a test, after a good push, and check it afterwards; if that fails, restore its processes."""
    if not node.before:
        node.check()
    yield node
    try:
        node.check()
    except BaseException:
        node.restore()
        raise
