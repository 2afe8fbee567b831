"""What operators ask of a daemon that is in the middle of a push, follows one, or stops, is answered at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.leaders import call, daemons_of
from tests.marks import slow

pytestmark = pytest.mark.faults

COMMAND = Path(sys.executable).with_name("weightsync")


def run(daemon, *words):
    env = {**os.environ, "COLUMNS": "160", "NO_COLOR": "1", "WEIGHTSYNC_DAEMON": daemon.endpoint}
    done = subprocess.run([COMMAND, *words], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def push_by_hand(node, daemon):
    words = ("--version", str(node.next_version()), "--timeout", "20", "--json")
    return run(daemon, "push", node.checkpoint("B"), *words)


@pytest.mark.timeout(180)
def test_in_the_middle_of_a_push(leaders):
    home, away = daemons_of(leaders)
    (rank,) = leaders.start_ranks(1)
    call(leaders, rank, home, group="one", gate=["read", 12])
    rank.wait_at("read")
    for daemon in (home, away):
        status = run(daemon, "status", "--json")
        assert status.returncode == 0, status.stderr
        shown = json.loads(status.stdout)
        assert (shown["push"] is None) == (daemon is away)
        assert (shown["follows"] is None) == (daemon is home)
        for words in (("status",), ("engines",), ("engines", "--json")):
            done = run(daemon, *words)
            assert done.returncode == 0, (words, done.stdout, done.stderr)
        pushed = push_by_hand(leaders, daemon)
        assert pushed.returncode == 1, pushed.stdout
        assert "by another trainer is under way" in pushed.stderr
        assert (f"node {home.name} leads" in pushed.stderr) == (daemon is away)
    traced = run(home, "trace", "--output", str(leaders.fleet.root / "trace.json"))
    assert traced.returncode == 0, traced.stderr
    rank.go()
    assert rank.report()["complete"]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("which", [0, slow(1)])
def test_while_the_daemon_stops(leaders, which):
    """It has a push under way, which has some time to end; who comes later is told that nobody listens."""
    home = leaders.daemon
    stopping = daemons_of(leaders)[which]
    (rank,) = leaders.start_ranks(1)
    call(leaders, rank, home, group="one", gate=["read", 12])
    rank.wait_at("read")
    stopping.kill(signal.SIGTERM)
    try:
        if which == 0:
            leaders.wait_log("a push is under way and has", stopping)
        status = run(stopping, "status", "--json")
        assert status.returncode == 0 or "no weightsyncd listens" in status.stderr, status.stderr
        pushed = push_by_hand(leaders, stopping)
        assert pushed.returncode == 1, pushed.stdout
        assert "weightsyncd is stopping" in pushed.stderr or "no weightsyncd listens" in pushed.stderr, pushed.stderr
    finally:
        rank.go()
        rank.result()
        stopping.wait(30)
        leaders.fleet.restart_daemon(stopping)
        for daemon in daemons_of(leaders):
            leaders.fleet.wait_daemon(daemon, engines=3, peers=1)
