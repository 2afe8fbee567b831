"""Nodes that know one of them, the seed, and are told of each other by it."""

from __future__ import annotations

import signal

import pytest

from tests.e2e.conftest import TINY
from tests.faults.kit import until
from tests.own import free_port, named
from weightsync import push_weights
from weightsync.adapters.reference.checkpoint import random_checkpoint
from weightsync.fleet import Fleet
from weightsync.operator import fetch_status
from weightsync.sources import CheckpointSource

pytestmark = pytest.mark.e2e
ARENA = {"slots": 3, "slot_bytes": "64KiB"}
N = [named(f"seeded{i}") for i in range(3)]
TIMEOUTS = {"operation": 20}  # half of which a bridge has to load torch, whatever else runs


def peers(daemon):
    return fetch_status(daemon.endpoint).peers


def connected(daemon, *names):
    until(lambda: peers(daemon) == dict.fromkeys(names, "connected"), f"{daemon.name} is connected to {names}")


class Nodes:
    """Three with an engine each, the first of which is the seed; none is started yet."""

    def __init__(self, fleet, liveness):
        self._fleet, self._timeouts = fleet, {**TIMEOUTS, "liveness": liveness}
        random_checkpoint(TINY, fleet.root / "A", seed=0)
        random_checkpoint(TINY, fleet.root / "B", seed=1)
        self._engines = [fleet.start_engine(f"e{i}", fleet.root / "A", wait=False) for i in range(3)]
        for engine in self._engines:
            fleet.wait_engine(engine)
        self._ports = [free_port() for _ in range(3)]

    def start(self, i):
        ports = self._ports
        cluster = {"listen": f"tcp://127.0.0.1:{ports[i]}", "seed": f"tcp://127.0.0.1:{ports[0]}"}
        return self._fleet.start_daemon(N[i], [self._engines[i]], arena=ARENA, timeouts=self._timeouts, cluster=cluster)

    def push(self, daemon, version):
        with CheckpointSource(self._fleet.root / "AB"[version % 2]) as source:
            report = push_weights(source, version=version, daemon=daemon.endpoint, timeout=30)
        assert report.complete, report
        return {engine.engine for engine in report.engines}


def test_nodes_find_each_other():
    with Fleet() as fleet:
        nodes = Nodes(fleet, 5.0)
        second = nodes.start(1)  # the seed need not be first
        until(lambda: "did not answer" in fetch_status(second.endpoint).seed, "it says that it looks for the seed")
        seed = nodes.start(0)
        connected(seed, N[1])
        connected(second, N[0])
        assert fetch_status(second.endpoint).seed == ""
        assert nodes.push(second, 1) == {"e0", "e1"}


@pytest.mark.slow
def test_nodes_come_and_go():
    with Fleet() as fleet:
        nodes = Nodes(fleet, 1.0)
        seed, second = nodes.start(0), nodes.start(1)
        third = nodes.start(2)
        for daemon, others in ((seed, (N[1], N[2])), (second, (N[0], N[2])), (third, (N[0], N[1]))):
            connected(daemon, *others)
        assert nodes.push(third, 2) == {"e0", "e1", "e2"}
        # the seed is away: the others stay as they are
        seed.kill(signal.SIGKILL)
        seed.wait(10)
        until(lambda: peers(third)[N[0]] != "connected", "it is missed")
        until(lambda: peers(third)[N[1]] == "connected", "the others form without it")
        fleet.restart_daemon(seed)
        for daemon, others in ((seed, (N[1], N[2])), (second, (N[0], N[2])), (third, (N[0], N[1]))):
            connected(daemon, *others)
        # one that is told to stop has left for good; one that is killed is missed for a while
        third.kill(signal.SIGTERM)
        third.wait(20)
        connected(second, N[0])
        assert nodes.push(second, 3) == {"e0", "e1"}
        fleet.restart_daemon(third)
        connected(second, N[0], N[2])
        third.kill(signal.SIGKILL)
        third.wait(10)
        until(lambda: peers(second).get(N[2], "connected") != "connected", "it is missed")
        connected(second, N[0])
        assert "Traceback" not in "".join(daemon.log.read_text() for daemon in (seed, second, third))
