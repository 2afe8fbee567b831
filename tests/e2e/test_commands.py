"""The console scripts, as an operator runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.e2e.conftest import get
from tests.own import named
from weightsync import push_weights
from weightsync.errors import PushRefused
from weightsync.operator import fetch_status
from weightsync.testing import eventually

pytestmark = pytest.mark.e2e


def run(*arguments: str, node=None, timeout: float = 150) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": "160", "NO_COLOR": "1"}
    if node is not None:
        env["WEIGHTSYNC_DAEMON"] = node.daemon.endpoint
    script = Path(sys.executable).with_name(arguments[0])
    return subprocess.run(
        [script, *arguments[1:]], env=env, capture_output=True, text=True, timeout=timeout, check=False
    )


def test_push_a_checkpoint_directory(node):
    version = next(node.versions)
    done = run("weightsync", "push", node.checkpoint("B"), "--version", str(version), "--json", node=node)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["complete"]
    assert report["version"] == version
    node.assert_holds(node.weights("B"), version)
    again = run("weightsync", "push", node.checkpoint("B"), "--version", str(version), node=node)
    assert again.returncode == 1
    assert "is not above version" in again.stderr
    assert "Traceback" not in again.stderr


def pushing_state(node) -> str | None:
    push = fetch_status(node.daemon.endpoint).push
    return push.state if push is not None else None


def test_ctrl_c_aborts_a_push_and_says_so(node):
    """The engines are stopped, so that the push is certainly under way when the signal comes."""
    version = next(node.versions)
    for engine in node.engines:
        os.kill(engine.pid, signal.SIGSTOP)
    try:
        pushing = subprocess.Popen(
            [Path(sys.executable).with_name("weightsync"), "push", node.checkpoint("B"), "--version", str(version)],
            env={**os.environ, "WEIGHTSYNC_DAEMON": node.daemon.endpoint}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert eventually(lambda: pushing_state(node) == "opening", seconds=20)
        pushing.send_signal(signal.SIGINT)
        _, said = pushing.communicate(timeout=20)
        assert pushing.returncode == 130
        assert "interrupted; the push is aborted" in said
        # over for the trainer; the daemon still waits for the stopped engines to answer
        assert eventually(lambda: pushing_state(node) == "aborted", seconds=20)
    finally:
        for engine in node.engines:
            os.kill(engine.pid, signal.SIGCONT)
    assert eventually(lambda: pushing_state(node) is None, seconds=20)
    last = fetch_status(node.daemon.endpoint).last_error
    assert last is not None
    assert "rank 0 was interrupted" in last.message
    again = run("weightsync", "push", node.checkpoint("B"), "--version", str(next(node.versions)), "--json", node=node)
    assert json.loads(again.stdout)["complete"]


def test_push_something_that_is_no_checkpoint(node, tmp_path):
    done = run("weightsync", "push", str(tmp_path), "--version", "1000", node=node)
    assert done.returncode == 1
    assert str(tmp_path) in done.stderr
    assert "Traceback" not in done.stderr


def test_status_and_engines(node):
    version = next(node.versions)
    run("weightsync", "push", node.checkpoint("A"), "--version", str(version), node=node)
    status = json.loads(run("weightsync", "status", "--json", node=node).stdout)
    assert status["node"] == node.daemon.name
    assert {e["name"]: (e["state"], e["version"]) for e in status["engines"]} == {
        "e1": ("serving", version),
        "e2": ("serving", version),
    }
    assert status["last"]["version"] == version
    assert {engine["not_pushed"] for engine in status["last"]["engines"]} == {0}
    assert [b["outstanding"] for b in status["bridges"]] == [0]
    table = run("weightsync", "status", node=node).stdout
    assert "serving" in table
    assert "last push" in table
    assert "no push is under way" in table
    assert status["shm_free"] > 0
    assert status["last_ago"] >= 0
    assert [(b["taken"], b["holding"]) for b in status["bridges"]] == [(0, {})]
    assert status["bridges"][0]["exports"] > 0
    engines = json.loads(run("weightsync", "engines", "--json", node=node).stdout)
    assert [e["tp_size"] for e in engines] == [1, 2]
    assert "reference" in run("weightsync", "engines", node=node).stdout


def test_where_a_push_spent_its_time(node, tmp_path):
    version = next(node.versions)
    run("weightsync", "push", node.checkpoint("A"), "--version", str(version), node=node)
    run("weightsync", "push", node.checkpoint("B"), "--version", str(version), node=node)  # refused
    failed = json.loads(run("weightsync", "trace", "--failed", "--json", node=node).stdout)
    assert failed["push"]["state"] == "aborted"
    assert "is not above version" in failed["push"]["error"]
    version = next(node.versions)
    run("weightsync", "push", node.checkpoint("B"), "--version", str(version), node=node)
    done = run("weightsync", "trace", "-o", str(tmp_path / "push.json"), node=node)
    assert done.returncode == 0, done.stderr
    assert f"version {version} of default, committed" in done.stdout
    summary = json.loads(run("weightsync", "trace", str(tmp_path / "push.json"), "--json").stdout)
    assert (summary["failed"], summary["unfinished"]) == ([], [])
    assert {engine["engine"] for engine in summary["engines"]} == {"e1", "e2"}
    steps = {step["step"]: step for step in summary["steps"]}
    last = fetch_status(node.daemon.endpoint).last
    assert last is not None
    assert steps["load"]["bytes"] == 2 * summary["push"]["bytes"] >= 2 * last.nbytes
    assert steps["fill"]["bytes"] <= last.nbytes  # what ranks wrote, without the padding between tensors
    assert steps["verify"]["pieces"] == 2
    none = run("weightsync", "trace", "--model", "other", node=node)
    assert none.returncode == 1
    assert "no push of model 'other' has begun" in none.stderr


def test_status_where_nobody_listens(tmp_path):
    done = run("weightsync", "status", "--daemon", f"ipc://{tmp_path}/none.sock")
    assert done.returncode == 1
    assert "no weightsyncd listens" in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["push", "--help"], ["status", "--help"], ["demo", "--help"]])
def test_help_teaches(arguments):
    done = run("weightsync", *arguments)
    assert done.returncode == 0
    assert len(done.stdout) > 200


def test_the_service_checks_its_config_and_lists_every_mistake(tmp_path):
    config = tmp_path / "node.toml"
    config.write_text('[arena]\nslot = 3\nslots = 0\n[[engines]]\nname = "a"\n')
    done = run("weightsyncd", "--node-config", str(config))
    assert done.returncode == 2
    for words in ("arena.slot: unknown key; did you mean slots?", "arena.slots = 0", "engines[0].url: is missing"):
        assert words in done.stderr
    config.write_text("")
    assert run("weightsyncd", "--node-config", str(config), "--check").returncode == 0
    assert run("weightsyncd", "--node-config", str(tmp_path / "none.toml")).returncode == 2


def test_metrics_and_health(node, unused_port):
    metrics_node = named("metrics")
    daemon = node.fleet.start_daemon(
        metrics_node, [], http={"listen": f"127.0.0.1:{unused_port}"}, log={"format": "json"}
    )
    try:
        url = f"http://127.0.0.1:{unused_port}"
        assert get(f"{url}/healthz").text == "ok\n"
        metrics = get(f"{url}/metrics").text
        assert f'weightsync_bridge_restarts{{bridge="{metrics_node}/0"}} 0.0' in metrics
        assert get(f"{url}/other").status_code == 404
        with pytest.raises(PushRefused, match="no engine serves model 'lost'"):
            push_weights({"w": torch.zeros(1)}, version=3, model="lost", daemon=daemon.endpoint)
        metrics = get(f"{url}/metrics").text
        assert 'weightsync_push_failures_total{kind="PushRefused",model="unknown"} 1.0' in metrics
        assert "weightsync_push_under_way_seconds 0.0" in metrics
    finally:
        daemon.kill(signal.SIGTERM)
        assert daemon.wait(20) == 0
    lines = [json.loads(line) for line in daemon.log.read_text().splitlines()]
    (refused,) = [line for line in lines if "refused" in line["message"]]
    assert (refused["level"], refused["model"], refused["version"], refused["rank"]) == ("warning", "lost", 3, 0)
    assert any(line.get("bridge") == f"{metrics_node}/0" for line in lines)


def test_a_second_daemon_of_the_same_node_is_refused(node):
    done = subprocess.run(
        [Path(sys.executable).with_name("weightsyncd"), "--node-config", node.daemon.config],
        env=node.fleet.env, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"another weightsyncd serves node '{node.daemon.name}'" in done.stderr


def test_the_demo():
    done = run("weightsync", "demo", "--steps", "2", "--json", timeout=220)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout)
    assert result["ok"]
    assert [(p["model"], p["version"]) for p in result["pushes"]] == [
        ("dense", 1),
        ("dense", 2),
        ("moe", 1),
        ("moe", 2),
    ]
    assert all(p["ranks_equal"] == p["ranks"] == 5 and p["tokens_equal"] == 3 for p in result["pushes"])
    assert result["left_behind"] == []
