"""Daemons of several machines: TCP under the cluster's key, and each the other's peer."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import TINY
from tests.faults.kit import until
from tests.own import free_port, named
from tests.wire_examples import EXAMPLES
from weightsync import push_weights
from weightsync.adapters.reference.checkpoint import random_checkpoint
from weightsync.errors import ConfigError, DaemonLost
from weightsync.fleet import Fleet
from weightsync.operator import fetch_status
from weightsync.sources import CheckpointSource
from weightsync.wire import messages as msg
from weightsync.wire.keys import read_key_file
from weightsync.wire.trainer_link import TrainerLink

COMMAND = Path(sys.executable).with_name("weightsync")
N = [named(f"n{i}") for i in range(2)]
ARENA = {"slots": 3, "slot_bytes": "64KiB"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for seed, name in enumerate("AB"):
        random_checkpoint(TINY, folder / name, seed=seed)
    return {name: str(folder / name) for name in "AB"}


@pytest.fixture(scope="module")
def cluster(checkpoints):
    """Two nodes that are each other's peers, with an engine each, over TCP with one key."""
    with Fleet() as fleet:
        key = fleet.root / "cluster.key"
        subprocess.run([COMMAND, "keygen", key], check=True, timeout=60)
        engines = [fleet.start_engine(f"e{i}", checkpoints["A"], wait=False) for i in range(2)]
        for engine in engines:
            fleet.wait_engine(engine)
        listen = [f"tcp://127.0.0.1:{free_port()}" for _ in range(2)]
        daemons = [
            fleet.start_daemon(
                N[i],
                [engines[i]],
                arena=ARENA,
                cluster={"listen": listen[i], "key_file": key},
                peers={N[1 - i]: listen[1 - i]},
                wait=False,
            )
            for i in range(2)
        ]
        for daemon in daemons:
            fleet.wait_daemon(daemon, engines=1, peers=1)
        yield fleet, daemons, key


def test_each_node_pushes_to_both(cluster, checkpoints):
    """In turn: the communicator is formed anew by whoever pushes, and neither waits for the other."""
    _, daemons, _ = cluster
    for version, daemon in enumerate(daemons * 8, start=1):  # often enough to meet the tail of the one before
        with CheckpointSource(checkpoints["B" if version % 2 else "A"]) as source:
            report = push_weights(source, version=version, daemon=daemon.endpoint, timeout=60)
        assert report.complete, report
        assert {e.engine for e in report.engines} == {"e0", "e1"}
        assert report.seconds < 20, "an operation's time: one waited for the other"


def test_operators_may_ask_from_afar(cluster, monkeypatch):
    _, daemons, key = cluster
    monkeypatch.setenv("WEIGHTSYNC_KEY_FILE", str(key))
    assert "e1" in {e.name for e in fetch_status(daemons[1].listen).engines}
    monkeypatch.delenv("WEIGHTSYNC_KEY_FILE")
    for endpoint, kind in ((daemons[1].listen, DaemonLost), ("tcp://10.1.2.3:29600", ConfigError)):
        with pytest.raises(kind) as refused:
            fetch_status(endpoint, timeout=0.5)
        assert "WEIGHTSYNC_KEY_FILE" in (refused.value.hint or "")


def test_trainers_push_through_their_own_node(cluster):
    _, daemons, key = cluster
    link = TrainerLink(daemons[1].listen, key=read_key_file(key))
    try:
        link.start()
        opening = next(message for message in EXAMPLES if isinstance(message, msg.Open))
        link.send(opening)
        answer = link.receive(time.monotonic() + 20)
    finally:
        link.close()
    assert isinstance(answer, msg.ErrorReply)
    assert (answer.id, answer.error.message) == (opening.id, "Open is taken on a node's own socket alone")


def test_a_node_without_the_key_is_told_why(cluster):
    fleet, daemons, _ = cluster
    other = fleet.root / "other.key"
    subprocess.run([COMMAND, "keygen", other], check=True, timeout=60)
    stranger = fleet.start_daemon(
        named("stranger"),
        arena=ARENA,
        timeouts={"liveness": 0.5},
        cluster={"key_file": other},
        peers={N[0]: daemons[0].listen},
        wait=False,
    )
    fleet.wait_daemon(stranger)
    words = "does not have this node's key; the file of [cluster] key_file must be the same on every node"
    until(lambda: words in fetch_status(stranger.endpoint).peers[N[0]], "it is told")
