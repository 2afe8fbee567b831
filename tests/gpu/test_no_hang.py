"""No push hangs: whoever is killed, or stands still, at whatever state of it.

Every push ends before its deadline and two seconds, naming who it was or the engines that missed it; no engine serves
a mixture; and the next push reaches all engines, with everything that has lived through the last still there.

With NO_HANG_DEVICE=cpu the same cases run without a GPU, over gloo. With `-n 3` three pairs of nodes share the cases.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch

from tests.gpu.no_hang_kit import Nodes, two_nodes

if TYPE_CHECKING:
    from collections.abc import Iterator

DEVICE = os.environ.get("NO_HANG_DEVICE", "cuda")
pytestmark = [
    pytest.mark.timeout(150),
    pytest.mark.faults,
    pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="each node needs a GPU"),
]

SIGNALS = ["SIGKILL", "SIGSTOP"]
VICTIMS = ["rank", "bridge home", "bridge away", "daemon away", "worker home", "worker away"]
STATES = ["filling", "on the wire", "loading", "verifying"]


@pytest.fixture(scope="module")
def _pair() -> Iterator[Nodes]:
    with two_nodes(DEVICE) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def _alone(_pair: Nodes) -> Iterator[Nodes]:
    nodes = _pair.alone()
    yield nodes
    nodes.end_ranks()


@pytest.fixture
def nodes(_pair: Nodes) -> Iterator[Nodes]:
    """Two nodes, with engines on both."""
    yield from _tried(_pair)


@pytest.fixture
def alone(_alone: Nodes) -> Iterator[Nodes]:
    """One node, whose trainer has its weights read in place."""
    yield from _tried(_alone)


def _tried(nodes: Nodes) -> Iterator[Nodes]:
    if not nodes.ranks:
        with nodes.logs():
            nodes.push_again()
    nodes.good = False
    yield nodes
    if not nodes.good:
        nodes.restore()


def hit(nodes: Nodes, who: str, state: str, by: str) -> None:
    with nodes.logs():
        victim = nodes.victim(who)
        nodes.reach(state, victim)
        nodes.hit(victim, by)
        nodes.go_on(victim)
        outcomes = nodes.ended(victim)
        nodes.check_engines(outcomes, but=victim.engine)
        nodes.mend(victim, by)
        nodes.push_again()
    nodes.good = True


@pytest.mark.parametrize("by", SIGNALS)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("who", VICTIMS)
def test_a_push_ends_whoever_goes(nodes, who, state, by):
    hit(nodes, who, state, by)


@pytest.mark.parametrize(("who", "by"), [("worker home", "SIGSTOP"), ("worker away", "SIGKILL")])
def test_a_push_ends_though_a_worker_goes_as_its_engine_finishes(nodes, who, by):
    hit(nodes, who, "finishing", by)


@pytest.mark.parametrize("by", SIGNALS)
@pytest.mark.parametrize(("who", "state"), [("rank", "exposing"), ("rank", "drawing"), ("worker away", "drawing")])
def test_a_push_in_place_ends_whoever_goes(alone, who, state, by):
    hit(alone, who, state, by)
