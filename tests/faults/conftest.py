"""One node and one pair of nodes for all fault tests: starting an engine takes seconds, breaking it does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.faults.kit import ARENA, TIMEOUTS, TINY, TRAINER, Node, segments, until
from weightsync.adapters.reference.checkpoint import random_checkpoint
from weightsync.fleet import Fleet

if TYPE_CHECKING:
    from collections.abc import Iterator


def _prepared(fleet: Fleet) -> None:
    for seed, name in enumerate("ABC"):
        random_checkpoint(TINY, fleet.root / name, seed)


@pytest.fixture(scope="session")
def _one_node() -> Iterator[Node]:
    with Fleet() as fleet:
        _prepared(fleet)
        engines = [
            fleet.start_engine(name, fleet.root / "A", tp=tp, flags=["--enable-faults"], wait=False)
            for name, tp in (("e1", 1), ("e2", 2))
        ]
        trainer = fleet.spawn("trainer", [str(TRAINER), str(fleet.root / "trainer.sock")])
        for engine in engines:
            fleet.wait_engine(engine)
        daemon = fleet.start_daemon("fault0", engines, arena=ARENA, timeouts=TIMEOUTS, log={"level": "debug"})
        until((fleet.root / "trainer.sock").exists, "the trainer listens", 30)
        yield Node(fleet, daemon, engines, trainer)
        words = daemon.log.read_text()
        assert "Traceback" not in words, words[words.index("Traceback") - 500 :]
        assert "never retrieved" not in words
    assert not segments("fault0")


@pytest.fixture
def node(_one_node: Node) -> Iterator[Node]:
    """One node, whose two engines serve checkpoint `node.before`; whatever a test does to it, the next push mends."""
    yield from _tried(_one_node)


def _tried(node: Node) -> Iterator[Node]:
    if not node.before:
        node.check()
    yield node
    try:
        node.check()
    except BaseException:
        node.restore()
        raise
