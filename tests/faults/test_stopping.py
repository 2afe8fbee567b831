"""weightsyncd told to stop, by SIGTERM or Ctrl-C, whatever it is doing: it ends in time, with status 0, and is gone."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from tests.faults.kit import ARENA, AT_ONCE, TIMEOUTS, segments, until
from tests.faults.stopwatch import Stopwatch
from tests.own import free_port, named
from weightsync.operator import fetch_status
from weightsync.testing import eventually

pytestmark = pytest.mark.faults

STOP = TIMEOUTS["stop"]
MARGIN = 1.0  # seconds beyond timeouts.stop for a process to be killed and an interpreter to end


def socket_of(daemon):
    return Path(daemon.endpoint.removeprefix("ipc://"))


def bridges_of(daemon):
    return [psutil.Process(b.pid) for b in fetch_status(daemon.endpoint).bridges]


def gone(daemon, bridges, within):
    """It ends by itself with status 0 within so many seconds, and nothing of it is left."""
    assert daemon.wait(within) == 0, daemon.tail()
    until(lambda: not segments(daemon.name), "a bridge that was just starting hears of it, and removes its arena")
    assert not socket_of(daemon).exists()
    assert not any(b.is_running() for b in bridges), "a bridge outlives its daemon"
    words = daemon.log.read_text()
    assert "Traceback" not in words, words


def wait_reached(node, read):
    """Return once a push whose rank stands before this read has paused the engines, or touched them."""
    what = "torn" if read else "paused"
    until(lambda: all(node.info(engine)[what] for engine in node.engines), f"both engines are {what}")


@pytest.fixture
def stopped(node):
    """The node, whose daemon the test tells to stop, and which has one again afterwards."""
    yield node
    if not eventually(lambda: node.daemon.process.poll() is not None):
        node.daemon.kill()
    node.fleet.restart_daemon(node.daemon)


@pytest.fixture
def alone(node):
    """Starts daemons that have no engines, and ends what is left of them."""
    started = []

    def start(**sections):
        wait = sections.pop("wait", True)
        daemon = node.fleet.start_daemon(named("fault7"), [], wait=wait, arena=ARENA, timeouts=TIMEOUTS, **sections)
        started.append(daemon)
        return daemon

    yield start
    for daemon in started:
        node.fleet.end(daemon)
        daemon.log.unlink(missing_ok=True)
        node.fleet.children.remove(daemon)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_daemon_ends_and_another_starts_at_once(node, alone, number):
    daemon = alone()
    for _ in range(2):
        bridges = bridges_of(daemon)
        assert len(segments(daemon.name)) == 1
        daemon.kill(number)
        gone(daemon, bridges, STOP)
        node.fleet.restart_daemon(daemon)  # the lock, the socket and the arena's name are free


def test_a_daemon_that_is_still_starting_ends_too(alone):
    daemon = alone(wait=False)
    process = psutil.Process(daemon.pid)
    until(lambda: bool(process.children()), "it starts its bridge")
    bridges = process.children()
    daemon.kill(signal.SIGTERM)
    gone(daemon, bridges, TIMEOUTS["bridge_start"])


def test_signals_that_do_not_cease_do_no_harm(alone):
    daemon = alone()
    bridges = bridges_of(daemon)

    def ended():
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ProcessLookupError):
                daemon.process.send_signal(number)
        return daemon.process.poll() is not None

    until(ended, "it ends", STOP)
    gone(daemon, bridges, STOP)


def test_somebody_who_holds_its_page_open_does_not_hold_it_up(alone):
    port = free_port()
    daemon = alone(http={"listen": f"127.0.0.1:{port}"})
    bridges = bridges_of(daemon)
    with socket.create_connection(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port)) as slow:
        slow.sendall(b"GET /metr")
        assert httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=5, trust_env=False).text == "ok\n"
        daemon.kill(signal.SIGTERM)
        gone(daemon, bridges, STOP)


@pytest.mark.parametrize("signals", [1, 3])
def test_a_push_that_can_end_is_let_end(stopped, signals):
    node = stopped
    ranks = node.start_ranks(2)
    bridges = bridges_of(node.daemon)
    node.push_all(ranks, node.next_version(), only={0: {"gate": ["read", 5]}})
    ranks[0].wait_at("read")
    since = node.log_length()
    node.daemon.kill(signal.SIGTERM)
    node.wait_log("stopping; a push is under way", since=since)
    for _ in range(signals - 1):
        node.daemon.kill(signal.SIGTERM)
    (newcomer,) = node.start_ranks(1)
    newcomer.push(**node.terms(0, 1, version=node.next_version(), group="another"))
    refused = newcomer.error()
    assert (refused["kind"], refused["message"]) == ("PushRefused", "weightsyncd is stopping")
    assert refused["seconds"] < AT_ONCE
    ranks[0].go()
    assert all(rank.report()["complete"] for rank in ranks)
    gone(node.daemon, bridges, STOP)
    for engine in node.engines:
        node.serves(engine, "C")
    newcomer.push(**node.terms(0, 1, version=node.next_version()))
    assert newcomer.error()["kind"] == "DaemonLost"


@pytest.mark.parametrize("signals", [1, 3])
@pytest.mark.parametrize("read", [0, 9])
def test_a_push_that_cannot_end_is_ended(stopped, read, signals):
    """At rank 0's first read no engine is touched yet; at its tenth both are."""
    node = stopped
    ranks = node.start_ranks(2)
    bridges = bridges_of(node.daemon)
    node.push_all(ranks, node.next_version(), only={0: {"gate": ["read", read]}})
    ranks[0].wait_at("read")
    wait_reached(node, read)
    told = Stopwatch()
    for _ in range(signals):
        node.daemon.kill(signal.SIGTERM)
    error = ranks[1].error()  # while rank 0 still stands at its gate
    assert told.seconds < STOP
    assert (error["kind"], error["phase"]) == ("PushAborted", "transfer")
    assert error["message"].startswith("weightsyncd was told to stop")
    gone(node.daemon, bridges, STOP + MARGIN)
    ranks[0].go()  # into an arena that is gone for all others
    late = ranks[0].error()
    error.pop("seconds")
    late.pop("seconds")
    assert late == error
    assert node.torn_or_whole(node.before) == ({"e1", "e2"} if read else set())


def test_a_push_whose_ranks_have_not_all_called_is_ended(stopped):
    node = stopped
    first, late = node.start_ranks(2)
    version = node.next_version()
    bridges = bridges_of(node.daemon)
    first.push(**node.terms(0, 2, version=version))
    node.wait_state("opening")
    node.daemon.kill(signal.SIGTERM)
    error = first.error()
    assert (error["kind"], error["phase"]) == ("PushAborted", "open")
    assert "weightsyncd was told to stop" in error["message"]
    gone(node.daemon, bridges, STOP)
    late.push(**node.terms(1, 2, version=version))
    assert late.error()["kind"] == "DaemonLost"
    assert node.torn_or_whole(node.before) == set()


def test_a_bridge_that_does_not_answer_does_not_hold_up_an_idle_daemon(alone):
    daemon = alone()
    bridges = bridges_of(daemon)
    bridges[0].suspend()
    daemon.kill(signal.SIGTERM)
    gone(daemon, bridges, STOP + MARGIN)


@pytest.mark.parametrize("read", [0, 9])
def test_a_bridge_that_does_not_answer_does_not_hold_up_the_end_of_a_push(stopped, read):
    node = stopped
    ranks = node.start_ranks(2)
    bridges = bridges_of(node.daemon)
    node.push_all(ranks, node.next_version(), only={0: {"gate": ["read", read]}})
    ranks[0].wait_at("read")
    wait_reached(node, read)
    bridges[0].suspend()
    node.daemon.kill(signal.SIGTERM)
    error = ranks[1].error()
    assert error["kind"] == "PushAborted"
    gone(node.daemon, bridges, STOP + MARGIN)
    ranks[0].go()
    assert ranks[0].error()["kind"] == "PushAborted"
    assert node.torn_or_whole(node.before) == ({"e1", "e2"} if read else set())


def test_ctrl_c_on_a_terminal_and_logs_of_json(node):
    """A shell that started it in the background, as scripts do; the push under way ends first. Bridges that are sent
    the Ctrl-C too leave their end to the daemon.
    """
    fleet = node.fleet
    log = {"level": "debug", "format": "json"}
    first = fleet.start_daemon(named("fault8"), node.engines, arena=ARENA, timeouts=TIMEOUTS, log=log)
    fleet.end(first)  # it has written the config, and its lines of JSON
    fleet.children.remove(first)
    ended = fleet.root / f"{first.name}.status"
    script = f"trap : INT; '{sys.executable}' -m weightsyncd --node-config '{first.config}' & wait $!; wait $!; echo $?"
    with first.log.open("ab") as said, ended.open("wb") as status:
        shell = subprocess.Popen(
            ["sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=status,
            stderr=said,
            env=fleet.env,
            start_new_session=True,
        )
    try:
        fleet.wait_daemon(first.__class__(first.name, shell, first.log, endpoint=first.endpoint), engines=2)
        bridges = bridges_of(first)
        (rank,) = node.start_ranks(1)
        rank.push(**{**node.terms(0, 1, version=node.next_version(), gate=["read", 5]), "endpoint": first.endpoint})
        rank.wait_at("read")
        for process in (psutil.Process(shell.pid), *psutil.Process(shell.pid).children(recursive=True)):
            process.send_signal(signal.SIGINT)
        until(lambda: "stopping; a push is under way" in first.log.read_text(), "it has heard")
        rank.go()
        assert rank.report()["complete"]
        assert shell.wait(STOP + MARGIN) == 0
    finally:
        if shell.poll() is None:
            for child in psutil.Process(shell.pid).children(recursive=True):
                child.kill()
        shell.wait(10)
    assert ended.read_text() == "0\n"
    assert not segments(first.name)
    assert not socket_of(first).exists()
    assert not any(b.is_running() for b in bridges)
    lines = [json.loads(line) for line in first.log.read_text().splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    assert not any("exception" in line for line in lines)
    assert sum("committed on 2 of 2 engines" in line["message"] for line in lines) == 1
    assert sum(f"node {first.name} has stopped" in line["message"] for line in lines) == 2


def test_nothing_is_held_against_the_next_push(node):
    """Stopped and started again and again, with pushes in between."""
    for name in "CAC":
        bridges = bridges_of(node.daemon)
        node.daemon.kill(signal.SIGTERM)
        gone(node.daemon, bridges, STOP)
        node.fleet.restart_daemon(node.daemon)
        assert eventually(lambda: all(e.state == "serving" for e in node.status().engines))
        node.holds(name, node.push(name))
