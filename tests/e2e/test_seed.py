"""Nodes that know one of them, the seed, and are told of each other by it."""

from __future__ import annotations

import signal

import pytest

from tests.e2e.conftest import TINY
from tests.faults.kit import until
from tests.own import free_port
from weightsync import push_weights
from weightsync.adapters.reference.checkpoint import random_checkpoint
from weightsync.fleet import Fleet
from weightsync.operator import fetch_status
from weightsync.sources import CheckpointSource

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(90)]
ARENA = {"slots": 3, "slot_bytes": "64KiB"}
TIMEOUTS = {"liveness": 1.0, "operation": 20}  # half of which a bridge has to load torch, whatever else runs


def peers(daemon):
    return fetch_status(daemon.endpoint).peers


def connected(daemon, *names):
    until(lambda: peers(daemon) == dict.fromkeys(names, "connected"), f"{daemon.name} is connected to {names}")


def test_nodes_find_each_other_come_and_go():
    with Fleet() as fleet:
        random_checkpoint(TINY, fleet.root / "A", seed=0)
        random_checkpoint(TINY, fleet.root / "B", seed=1)
        engines = [fleet.start_engine(f"e{i}", fleet.root / "A", wait=False) for i in range(3)]
        for engine in engines:
            fleet.wait_engine(engine)
        ports = [free_port() for _ in range(3)]

        def start(i):
            cluster = {"listen": f"tcp://127.0.0.1:{ports[i]}", "seed": f"tcp://127.0.0.1:{ports[0]}"}
            return fleet.start_daemon(f"n{i}", [engines[i]], arena=ARENA, timeouts=TIMEOUTS, cluster=cluster)

        def push(daemon, version):
            with CheckpointSource(fleet.root / "AB"[version % 2]) as source:
                report = push_weights(source, version=version, daemon=daemon.endpoint, timeout=30)
            assert report.complete, report
            return {engine.engine for engine in report.engines}

        second, seed = start(1), start(0)  # the seed need not be first
        connected(seed, "n1")
        connected(second, "n0")
        assert push(second, 1) == {"e0", "e1"}
        third = start(2)
        for daemon, others in ((seed, ("n1", "n2")), (second, ("n0", "n2")), (third, ("n0", "n1"))):
            connected(daemon, *others)
        assert push(third, 2) == {"e0", "e1", "e2"}
        # the seed is away: the others stay as they are
        seed.kill(signal.SIGKILL)
        seed.wait(10)
        until(lambda: peers(third)["n0"] != "connected", "it is missed")
        until(lambda: peers(third)["n1"] == "connected", "the others form without it")
        fleet.restart_daemon(seed)
        for daemon, others in ((seed, ("n1", "n2")), (second, ("n0", "n2")), (third, ("n0", "n1"))):
            connected(daemon, *others)
        # one that is told to stop has left for good; one that is killed is missed for a while
        third.kill(signal.SIGTERM)
        third.wait(20)
        connected(second, "n0")
        assert push(second, 3) == {"e0", "e1"}
        fleet.restart_daemon(third)
        connected(second, "n0", "n2")
        third.kill(signal.SIGKILL)
        third.wait(10)
        until(lambda: peers(second).get("n2", "connected") != "connected", "it is missed")
        connected(second, "n0")
        assert "Traceback" not in "".join(daemon.log.read_text() for daemon in (seed, second, third))
