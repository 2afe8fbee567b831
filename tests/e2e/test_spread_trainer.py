"""A trainer whose ranks are on several nodes: each calls its own node's daemon, and every engine of all gets all."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.e2e.conftest import TINY, get
from tests.own import named
from weightsync.adapters.reference.checkpoint import random_checkpoint
from weightsync.adapters.reference.oracle import expected_checksums
from weightsync.fleet import Daemon, Fleet

pytestmark = pytest.mark.e2e
SCRIPT = Path(__file__).with_name("fsdp2_push.py")
ARENA = {"slots": 2, "slot_bytes": "64KiB"}
DEBUG = {"level": "debug"}


class Nodes:
    """Some daemons, the first of which has the others for peers."""

    def __init__(self, fleet, engines):
        """`engines`: by node, the tensor parallel sizes of its engines."""
        self.fleet = fleet
        for seed, name in enumerate("AB"):
            random_checkpoint(TINY, fleet.root / name, seed)
        start = functools.partial(fleet.start_engine, checkpoint=fleet.root / "A", wait=False)
        of_nodes = [[start(f"e{number}{tp}", tp=tp) for tp in sizes] for number, sizes in enumerate(engines)]
        self.engines = [engine for own in of_nodes for engine in own]
        for engine in self.engines:
            fleet.wait_engine(engine)
        self.daemons: list[Daemon] = []
        for number, own in reversed(list(enumerate(of_nodes))):
            peers = self.daemons if number == 0 else []
            daemon = fleet.start_daemon(named(f"n{number}"), own, arena=ARENA, peers=peers, log=DEBUG)
            self.daemons = [daemon, *self.daemons]
        self.version = 1

    def push(self, checkpoint, ranks, *, daemons=None, mesh=()):
        """Two pushes from as many ranks; what they were told."""
        out = self.fleet.root / f"told{self.version}"
        out.mkdir()
        endpoints = ",".join(daemon.endpoint for daemon in daemons or self.daemons)
        arguments = [str(self.fleet.root / checkpoint), endpoints, str(self.version), str(out), *mesh]
        trainer = self.fleet.torchrun(f"trainer{self.version}", SCRIPT, ranks, arguments)
        logs = "\n".join(daemon.tail(30) for daemon in self.daemons)
        assert trainer.wait(150) == 0, f"{trainer.tail(60)}\n{logs}"
        self.version += 2
        told = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]
        assert all(words == told[0] for words in told), "every rank gets the same report"
        return told[0]

    def exchanges(self):
        """How many buckets were exchanged so far."""
        return self.daemons[0].log.read_text().count("exchange.complete")

    def check(self, checkpoint):
        weights = load_file(self.fleet.root / checkpoint / "model.safetensors")
        for engine in self.engines:
            found = get(f"{engine.url}/checksums").raise_for_status().json()
            assert found == expected_checksums(TINY, weights, engine.tp), engine.name
            info = get(f"{engine.url}/info").raise_for_status().json()
            assert (info["weight_version"], info["paused"], info["torn"]) == (self.version - 1, False, False)


@pytest.fixture(scope="module")
def two():
    with Fleet() as fleet:
        yield Nodes(fleet, [(1,), (2,)])


def test_fsdp2_ranks_on_two_nodes(two):
    before = two.exchanges()
    reports = two.push("B", 4)
    assert two.exchanges() - before == sum(report["buckets"] for report in reports)
    assert [report["complete"] for report in reports] == [True, True], reports
    assert {engine["engine"] for engine in reports[1]["engines"]} == {"e01", "e12"}
    two.check("B")


def test_hsdp_replicas_write_at_home_and_nothing_is_exchanged(two):
    """Each node has a whole copy in its two shards: what lies at home is broadcast, as from a trainer on one node."""
    before = two.exchanges()
    reports = two.push("A", 4, mesh=["2x2"])
    assert [report["complete"] for report in reports] == [True, True], reports
    two.check("A")
    assert two.exchanges() == before


def test_ranks_on_two_nodes_of_three_and_engines_on_others():
    with Fleet() as fleet:
        nodes = Nodes(fleet, [(), (1,), (1,)])
        reports = nodes.push("B", 2, daemons=nodes.daemons[:2])
        assert [report["complete"] for report in reports] == [True, True], reports
        nodes.check("B")


@pytest.mark.slow
def test_a_node_that_a_push_does_not_need_has_no_communicator_formed_anew_each_time():
    """Once for the engines, as the daemon starts, and once for the ranks of the first push."""
    with Fleet() as fleet:
        nodes = Nodes(fleet, [(1,), (), (1,), ()])
        for checkpoint in "BA":  # two pushes each
            nodes.push(checkpoint, 2, daemons=nodes.daemons[:2])
        nodes.check("A")
        generations = set(re.findall(r"generation=(\d+) rank=0\] join.complete", nodes.daemons[0].log.read_text()))
        assert 1 <= len(generations) <= 2, generations


def test_a_trainer_of_one_node_does_not_wait_for_the_others(two):
    """Its world is larger than one: who else might have ranks of it is told, and nobody has to answer."""
    reports = two.push("B", 2, daemons=two.daemons[:1])
    assert [report["complete"] for report in reports] == [True, True], reports
    two.check("B")
