"""Two machines, as near as one comes to it: network namespaces, and between them CURVE and gloo on a link that is cut.

Needs root, to make them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.faults.conftest import prepared
from tests.faults.kit import ARENA, TIMEOUTS, TRAINER, Node, until
from tests.own import named
from weightsync.fleet import Fleet
from weightsync.operator import fetch_status
from weightsync.wire.keys import make_key_file

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.faults

ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29600


def ip(*words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["ip", *words], capture_output=True, timeout=20, check=False)


class Machines:
    """Two namespaces and the link between them, whose ends are called like the namespaces they are in."""

    def __init__(self) -> None:
        self.names = tuple(named(f"ws{i}") for i in range(2))
        self.remove()  # what an interrupted run has left
        done = [ip("netns", "add", name) for name in self.names]
        done.append(ip("link", "add", self.names[0], "type", "veth", "peer", "name", self.names[1]))
        for name, address in zip(self.names, ADDRESSES, strict=True):
            done.append(ip("link", "set", name, "netns", name))
            done.append(ip("-n", name, "addr", "add", f"{address}/24", "dev", name))
            done += [ip("-n", name, "link", "set", link, "up") for link in (name, "lo")]
        self.problem = next((one.stderr.decode() for one in done if one.returncode), "")

    def within(self, i: int) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.names[i])

    def cut(self) -> None:
        assert not ip("-n", self.names[1], "link", "set", self.names[1], "down").returncode

    def mend(self) -> None:
        assert not ip("-n", self.names[1], "link", "set", self.names[1], "up").returncode

    def remove(self) -> None:
        for name in self.names:
            ip("netns", "del", name)


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    made = Machines()
    try:
        if made.problem:
            pytest.skip(f"no network namespaces here: {made.problem}")
        yield made
    finally:
        made.remove()


@pytest.fixture
def apart(_apart) -> Iterator[Node]:
    """As `_apart`; the ranks of a test end with it."""
    yield _apart
    while _apart.ranks:
        _apart.ranks.pop().close()


@pytest.fixture(scope="module")
def _apart(machines) -> Iterator[Node]:
    """A node on each machine, the other's peer, with an engine that only its own machine reaches."""
    with Fleet() as fleet:
        prepared(fleet)
        make_key_file(fleet.root / "key")
        engines = [
            fleet.start_engine(name, fleet.root / "A", tp=tp, within=machines.within(i), wait=False)
            for i, (name, tp) in enumerate((("home", 1), ("away", 2)))
        ]
        trainer = fleet.spawn("trainer", [str(TRAINER), str(fleet.root / "trainer.sock")])
        for engine in engines:
            fleet.wait_engine(engine)
        daemons = [
            fleet.start_daemon(
                named(f"apart{i}"),
                [engines[i]],
                peers={named(f"apart{1 - i}"): f"tcp://{ADDRESSES[1 - i]}:{PORT}"},
                arena=ARENA,
                timeouts={**TIMEOUTS, "operation": 8},
                log={"level": "debug"},
                cluster={
                    "listen": f"tcp://{ADDRESSES[i]}:{PORT}",
                    "address": ADDRESSES[i],
                    "key_file": fleet.root / "key",
                },
                within=machines.within(i),
                wait=False,
            )
            for i in range(2)
        ]
        for daemon in daemons:
            fleet.wait_daemon(daemon, engines=1, peers=1)
        until((fleet.root / "trainer.sock").exists, "the trainer listens", 30)
        node = Node(fleet, daemons[0], engines, trainer, [daemons[1]])
        node.wait_attached()
        yield node
        for daemon in daemons:
            assert "Traceback" not in daemon.log.read_text()


def push(node: Node, **terms):
    (rank,) = node.start_ranks(1)
    return rank.push(**node.terms(0, 1, version=node.next_version(), timeout=30, **terms))


def outcomes(report):
    return {engine["engine"]: engine["outcome"] for engine in report["engines"]}


def whole(node: Node) -> None:
    """The next push reaches both engines, tensor by tensor, and no process had to be started again for it."""
    node.wait_attached()
    report = push(node).report()
    assert report["complete"], report
    assert {engine["checked"] for engine in report["engines"]} == {report["tensors"]}


def test_a_push_reaches_the_other_machine(apart):
    whole(apart)


def test_the_other_machine_pushes_too(apart):
    report = push(apart, endpoint=apart.others[0].endpoint).report()
    assert report["complete"], report
    whole(apart)


def test_a_link_that_is_cut_between_pushes(apart, machines):
    machines.cut()
    try:
        report = push(apart).report()
    finally:
        machines.mend()
    assert outcomes(report) == {"home": "committed", "away": "lost"}
    whole(apart)


@pytest.mark.parametrize("read", [0, 9])
def test_a_link_that_is_cut_in_the_middle(apart, machines, read):
    """The engine beyond is lost to the push; what is on this side gets its version in time."""
    pids = [process.pid for process in (*apart.engines, apart.daemon, *apart.others)]
    rank = push(apart, gate=["read", read])
    rank.wait_at("read")
    machines.cut()
    try:
        rank.go()
        report = rank.report()
        assert outcomes(report) == {"home": "committed", "away": "lost"}
        assert report["seconds"] < 30 + 2
        until(lambda: fetch_status(apart.others[0].endpoint).engines[0].state in ("serving", "torn", "paused"), "it is")
    finally:
        machines.mend()
    whole(apart)
    assert pids == [process.pid for process in (*apart.engines, apart.daemon, *apart.others)]
    assert all(process.process.poll() is None for process in (*apart.engines, apart.daemon, *apart.others))


def spread(node: Node, **terms):
    """Ranks 0 and 1 of one trainer, each on a machine of its own."""
    ranks = node.start_ranks(2)
    version = node.next_version()
    for number, (rank, daemon) in enumerate(zip(ranks, (node.daemon, *node.others), strict=True)):
        more = terms if number == 1 else {}
        rank.push(**node.terms(number, 2, version=version, timeout=30, endpoint=daemon.endpoint, **more))
    return ranks


def test_ranks_on_both_machines_push_together(apart):
    for _ in range(2):
        reports = [rank.report() for rank in spread(apart)]
        assert all(report["complete"] for report in reports), reports
    whole(apart)


@pytest.mark.parametrize("read", [0, 6])
def test_a_link_between_ranks_that_is_cut(apart, machines, read):
    """Neither side has all of the weights: both hear of it in time, and what was torn is mended by the next push."""
    pids = [process.pid for process in (*apart.engines, apart.daemon, *apart.others)]
    ranks = spread(apart, gate=["read", read])
    ranks[1].wait_at("read")
    machines.cut()
    try:
        ranks[1].go()
        errors = [rank.error() for rank in ranks]
    finally:
        machines.mend()
    assert {error["kind"] for error in errors} == {"PushAborted"}
    assert f"trainer rank 1 of node {apart.others[0].name} cannot go on" in errors[0]["message"]
    assert f"node {apart.others[0].name} let go of the push" in errors[1]["message"]
    assert all(error["seconds"] < 20 for error in errors)
    whole(apart)
    reports = [rank.report() for rank in spread(apart)]
    assert all(report["complete"] for report in reports), reports
    assert pids == [process.pid for process in (*apart.engines, apart.daemon, *apart.others)]
