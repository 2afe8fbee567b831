"""Engines and nodes that come and go while weightsyncd runs."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import TINY, get
from tests.faults.kit import until
from tests.own import named
from weightsync import push_weights, push_weights_async
from weightsync.adapters.reference.checkpoint import random_checkpoint
from weightsync.errors import PushRefused
from weightsync.fleet import Fleet
from weightsync.operator import change_engines, fetch_status
from weightsync.sources import CheckpointSource

COMMAND = Path(sys.executable).with_name("weightsync")
VERSIONS = itertools.count(1)
ARENA = {"slots": 2, "slot_bytes": "64KiB"}


class Site:
    """A daemon with engine e0, another with e1, and e2, which nobody has."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        random_checkpoint(TINY, fleet.root / "A", seed=1)
        flags = ["--enable-faults"]
        self.engines = [fleet.start_engine(f"e{i}", fleet.root / "A", flags=flags, wait=False) for i in range(3)]
        for engine in self.engines:
            fleet.wait_engine(engine)
        timeouts = {"operation": 5.0, "probe_every": 0.5, "liveness": 2.0}
        self.here, self.there = (
            fleet.start_daemon(named(f"m{i}"), [self.engines[i]], arena=ARENA, timeouts=timeouts) for i in range(2)
        )
        self.file = self.here.config.read_text()

    def push(self) -> dict[str, str]:
        """What a push came to, by engine."""
        with CheckpointSource(self.fleet.root / "A") as source:
            report = push_weights(source, version=next(VERSIONS), daemon=self.here.endpoint, timeout=60)
        return {engine.engine: engine.outcome for engine in report.engines}

    def names(self) -> set[str]:
        return {engine.name for engine in fetch_status(self.here.endpoint).engines}

    def hold(self, endpoint: str, seconds: float = 60.0) -> None:
        """Have e0 hold back the next request to this endpoint; `let_go` ends that."""
        self._faults({"delay": {"endpoint": endpoint, "seconds": seconds}})

    def let_go(self) -> None:
        self._faults({"clear": True})

    def _faults(self, order: dict[str, object]) -> None:
        httpx.post(f"{self.engines[0].url}/faults", json=order, trust_env=False, timeout=20).raise_for_status()

    def hup(self, text: str) -> None:
        self.here.config.write_text(text)
        os.kill(self.here.pid, signal.SIGHUP)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        command: list[str | Path] = [COMMAND, "engines", *words, "--daemon", self.here.endpoint]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def site():
    with Fleet() as fleet:
        made = Site(fleet)
        yield made
        assert "Traceback" not in made.here.log.read_text()


@pytest.fixture(autouse=True)
def as_before(site):
    yield
    site.hup(site.file)
    until(lambda: site.names() == {"e0"} and not fetch_status(site.here.endpoint).peers, "it is as it was")


def states(site) -> set[tuple[str, str]]:
    return {(engine.name, engine.state) for engine in fetch_status(site.here.endpoint).engines}


def entry(engine) -> str:
    return f'[[engines]]\nname = "{engine.name}"\nkind = "reference"\nurl = "{engine.url}"\n'


def as_peer(daemon) -> str:
    """What makes it one, before the first engine."""
    return f'[cluster.peers]\n{daemon.name} = "{daemon.endpoint}"\n[[engines]]'


def test_an_engine_is_added_and_removed(site):
    assert site.push() == {"e0": "committed"}
    added = site.run("add", "e2", "--kind", "reference", "--url", site.engines[2].url, "--json")
    assert added.returncode == 0, added.stderr
    (found,) = json.loads(added.stdout)
    assert (found["name"], found["state"], found["tp_size"]) == ("e2", "blank", 1)
    assert site.push() == {"e0": "committed", "e2": "committed"}
    removed = site.run("remove", "e2")
    assert (removed.returncode, removed.stdout) == (0, "e2 is no longer an engine of this node\n")
    assert site.push() == {"e0": "committed"}
    left = get(f"{site.engines[2].url}/info").json()
    assert (left["paused"], left["torn"]) == (False, False)


def test_a_frozen_engine_takes_no_pushes(site):
    """Neither one of a model that others serve, nor, where that is refused, one of its own; nor one of a peer."""
    judge = f'{entry(site.engines[2])}model = "judge"\nfrozen = true\n'
    site.hup(f"{site.file}{entry(site.engines[2])}frozen = true\n")
    until(lambda: ("e2", "unknown") not in states(site) and site.names() == {"e0", "e2"}, "e2 was looked at")
    assert {engine.name for engine in fetch_status(site.here.endpoint).engines if engine.frozen} == {"e2"}
    before = get(f"{site.engines[2].url}/info").json()
    assert site.push() == {"e0": "committed"}
    assert get(f"{site.engines[2].url}/info").json() == before
    site.hup(f"{site.file}{judge}")
    until(lambda: {e.model for e in fetch_status(site.here.endpoint).engines} == {"default", "judge"}, "it judges")
    with CheckpointSource(site.fleet.root / "A") as source, pytest.raises(PushRefused, match="'judge'") as caught:
        push_weights(source, version=next(VERSIONS), model="judge", daemon=site.here.endpoint, timeout=60)
    assert "default, judge (frozen)" in (caught.value.hint or "")


def test_what_cannot_be_is_said_and_changes_nothing(site):
    url = site.engines[2].url
    for words, said in (
        (["add", "e0", "--kind", "reference", "--url", url], "has it already"),
        (["add", "e2", "--kind", "refrence", "--url", url], "one of reference, sglang, vllm"),
        (["add", "e 2", "--kind", "reference", "--url", url], "invalid engine: "),
        (["add", "e2", "--kind", "reference", "--url", url, "--api-key-env", "NOT_SET"], "NOT_SET is not set"),
        (["remove", "e7"], "no engine called 'e7'\n  hint: it has e0"),
    ):
        done = site.run(*words)
        assert done.returncode == 1
        assert said in done.stderr, done.stderr
    assert site.names() == {"e0"}


def test_an_engine_that_does_not_answer_is_added_as_lost(site):
    (found,) = change_engines(site.here.endpoint, add=[_reference("gone", "http://127.0.0.1:9")], timeout=30)
    assert (found.name, found.state) == ("gone", "lost")
    assert site.push() == {"e0": "committed", "gone": "lost"}


def test_nothing_changes_under_a_push(site):
    """It is made when the push has ended, and whoever asked for it waits as long."""
    site.hold("/finish")
    with CheckpointSource(site.fleet.root / "A") as source, ThreadPoolExecutor(1) as pool:
        handle = push_weights_async(source, version=next(VERSIONS), daemon=site.here.endpoint, timeout=60)
        until(lambda: state(site) == "committing", "e0 finishes")
        added = [_reference("e2", site.engines[2].url)]
        adding = pool.submit(change_engines, site.here.endpoint, add=added, remove=["e0"], timeout=30)
        site.let_go()
        assert {engine.engine: engine.outcome for engine in handle.result().engines} == {"e0": "committed"}
        assert [engine.name for engine in adding.result(30)] == ["e2"]
    assert site.push() == {"e2": "committed"}


def test_a_push_that_does_not_end_keeps_the_engines_as_they_are(site):
    for endpoint in ("/pause", "/begin", "/finish"):
        site.hold(endpoint, 2.5)  # together longer than a change waits, and each half of what an engine has for it
    with CheckpointSource(site.fleet.root / "A") as source:
        handle = push_weights_async(source, version=next(VERSIONS), daemon=site.here.endpoint, timeout=60)
        until(lambda: state(site) == "transferring", "e0 is paused")
        with pytest.raises(PushRefused, match="a push has been under way for 5 s"):
            change_engines(site.here.endpoint, remove=["e0"], timeout=30)
        assert handle.result().complete
    assert site.push() == {"e0": "committed"}


def state(site: Site) -> str | None:
    push = fetch_status(site.here.endpoint).push
    return None if push is None else str(push.state)


def test_sighup_has_the_file_read_again(site):
    site.hup(site.file + entry(site.engines[2]))
    until(lambda: site.names() == {"e0", "e2"}, "e2 is there")
    assert site.push() == {"e0": "committed", "e2": "committed"}
    site.hup(site.file.replace("[[engines]]", as_peer(site.there)))
    until(lambda: fetch_status(site.here.endpoint).peers == {site.there.name: "connected"}, "it is a peer")
    assert site.push() == {"e0": "committed", "e1": "committed"}


def test_a_name_that_a_peers_engine_has_is_refused(site):
    """Else the peer would be given up at its next heartbeat, all its engines with it."""
    site.hup(site.file.replace("[[engines]]", as_peer(site.there)))
    until(lambda: fetch_status(site.here.endpoint).peers == {site.there.name: "connected"}, "it is a peer")
    refused = site.run("add", "e1", "--kind", "reference", "--url", site.engines[2].url)
    assert refused.returncode == 1
    assert f"an engine of node {site.there.name} is called 'e1' already" in refused.stderr
    since = len(site.here.log.read_text())
    taken = entry(site.engines[2]).replace("e2", "e1")
    site.hup(site.file.replace("[[engines]]", as_peer(site.there)) + taken)
    until(lambda: "reload.failed" in site.here.log.read_text()[since:], "it says so")
    assert site.push() == {"e0": "committed", "e1": "committed"}


def test_a_file_with_mistakes_changes_nothing(site):
    since = len(site.here.log.read_text())
    site.hup(site.file + "[[engines]]\nname = 7\n")
    until(lambda: "reload.failed" in site.here.log.read_text()[since:], "it says so")
    assert "engines[1].url: is missing" in site.here.log.read_text()[since:]
    assert site.names() == {"e0"}
    site.hup(site.file.replace("slots = 2", "slots = 3"))
    until(lambda: "need a restart: arena.slots" in site.here.log.read_text()[since:], "it says what it left as it was")


def _reference(name: str, url: str):
    from weightsync.config import EngineConfig

    return EngineConfig(name=name, kind="reference", url=url)
