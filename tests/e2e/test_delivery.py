"""Weights out of a trainer's memory into engines of other nodes, without slots at either end."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.e2e.conftest import TINY, Node
from tests.e2e.test_push import push
from tests.own import named
from weightsync.adapters.reference.checkpoint import random_checkpoint
from weightsync.config import EngineConfig
from weightsync.fleet import Daemon, Engine, Fleet
from weightsync.operator import change_engines, fetch_status
from weightsync.testing import eventually

pytestmark = pytest.mark.e2e

ARENA = {"slots": 3, "slot_bytes": "64KiB"}  # a piece has so much at most: there are dozens


@dataclass
class Away(Node):
    others: list[Daemon] = field(default_factory=list)
    spare: list[Engine] = field(default_factory=list)  # that no daemon knows of

    def join(self, engine: Engine, daemon: Daemon) -> None:
        """One of the spare engines is looked after from here on."""
        config = EngineConfig(name=engine.name, kind="reference", url=engine.url)
        change_engines(daemon.endpoint, add=[config])
        self.spare.remove(engine)
        self.engines.append(engine)
        assert eventually(lambda: engine.name in {e.name for e in fetch_status(self.daemon.endpoint).engines})


@pytest.fixture(scope="module")
def away():
    """A node with the trainer and an engine, another with one of TP 2, and an empty one; two rails between them."""
    with Fleet() as fleet:
        for seed, name in enumerate("AB"):
            random_checkpoint(TINY, fleet.root / name, seed)
        sizes = {"e1": 1, "e2": 2, "e3": 1, "e4": 2}
        engines = [fleet.start_engine(name, fleet.root / "A", tp=tp, wait=False) for name, tp in sizes.items()]
        for engine in engines:
            fleet.wait_engine(engine)
        terms: Any = {"arena": ARENA, "node": {"bridges": 2}}
        others = [fleet.start_daemon(named(f"node{i}"), engines[1:2] if i == 1 else [], **terms) for i in (1, 2)]
        home = fleet.start_daemon(named("node0"), engines[:1], peers=others, **terms)
        yield Away(fleet, home, engines[:2], TINY, itertools.count(1), others, engines[2:])


def outcomes(report):
    return {engine.engine: (engine.outcome, engine.drawn, engine.checked) for engine in report.engines}


def assert_delivered(away, names):
    for name in names:
        weights = away.weights(name)
        version, report = push(away, weights, in_place=True)
        expected = ("committed", True, len(weights))
        assert outcomes(report) == {engine.name: expected for engine in away.engines}, away.daemon.tail(20)
        assert report.bytes == sum(w.nbytes for w in weights.values())
        assert report.phases["wire"] > 0
        away.assert_holds(weights, version)


def test_an_engine_elsewhere_takes_what_it_has_places_for(away):
    assert_delivered(away, "BAB")


def test_slots_and_deliveries_take_turns(away):
    for name, in_place in zip("ABAB", (True, False, True, False), strict=True):
        weights = away.weights(name)
        version, report = push(away, weights, in_place=in_place)
        assert [engine.drawn for engine in report.engines] == [in_place] * 2
        away.assert_holds(weights, version)


def test_several_engines_on_several_nodes_share_what_travels(away):
    away.join(away.spare[0], away.others[0])
    assert_delivered(away, "AB")
    away.join(away.spare[0], away.others[1])
    assert_delivered(away, "AB")
