"""Weights out of a trainer's memory into an engine of another node, without slots at either end."""

from __future__ import annotations

import itertools

import pytest

from tests.e2e.conftest import TINY, Node
from tests.e2e.test_push import push
from weightsync.adapters.reference.checkpoint import random_checkpoint
from weightsync.fleet import Fleet

pytestmark = pytest.mark.e2e

ARENA = {"slots": 3, "slot_bytes": "64KiB"}  # a piece has so much at most: there are dozens


@pytest.fixture(scope="module")
def away():
    """A node with the trainer and an engine, and another with one of TP 2; two rails between them."""
    with Fleet() as fleet:
        for seed, name in enumerate("AB"):
            random_checkpoint(TINY, fleet.root / name, seed)
        engines = [fleet.start_engine(f"e{tp}", fleet.root / "A", tp=tp, wait=False) for tp in (1, 2)]
        for engine in engines:
            fleet.wait_engine(engine)
        other = fleet.start_daemon("node1", engines[1:], arena=ARENA, node={"bridges": 2})
        home = fleet.start_daemon(
            "node0", engines[:1], arena=ARENA, node={"bridges": 2}, peers={"node1": other.endpoint}, wait=False
        )
        fleet.wait_daemon(home, engines=1, peers=1)
        yield Node(fleet, home, engines, TINY, itertools.count(1))


def outcomes(report):
    return {engine.engine: (engine.outcome, engine.drawn, engine.checked) for engine in report.engines}


def test_an_engine_elsewhere_takes_what_it_has_places_for(away):
    for name in "BAB":
        weights = away.weights(name)
        version, report = push(away, weights, in_place=True)
        assert outcomes(report) == dict.fromkeys(("e1", "e2"), ("committed", True, len(weights)))
        assert report.bytes == sum(w.nbytes for w in weights.values())
        assert report.phases["wire"] > 0
        away.assert_holds(weights, version)
