"""Whole pushes through a real daemon into real engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.marks import slow
from weightsync import push_weights, push_weights_async
from weightsync.adapters.reference.model import greedy, load_checkpoint
from weightsync.errors import ConfigError, DaemonLost, PushRefused, SourceError
from weightsync.sources.checkpoint import CheckpointSource
from weightsync.testing import eventually

pytestmark = pytest.mark.e2e


def push(node, weights, **options):
    version = next(node.versions)
    report = push_weights(weights, version=version, daemon=node.daemon.endpoint, timeout=30, **options)
    assert report.complete, str(report)
    return version, report


def test_a_mapping_reaches_every_rank_of_every_engine(node):
    weights = node.weights("B")
    version, report = push(node, weights)
    node.assert_holds(weights, version)
    assert report.bytes == sum(w.nbytes for w in weights.values())
    assert report.buckets > 3, "more buckets than slots, or the test shows little"
    assert {e.checked for e in report.engines} == {len(weights)}
    assert list(report.phases) == ["describe", "plan", "fill", "export", "wire", "load", "finalise", "verify"]
    assert report.phases["export"] > 0
    assert report.phases["wire"] == 0, "there is no other node"
    assert "committed" in str(report)


def test_a_push_leaves_a_trace(node):
    version, report = push(node, node.weights("A"))
    traces = node.fleet.root / "traces"
    assert eventually(lambda: list(traces.glob(f"push-*-v{version}.json")) != [])
    (path,) = traces.glob(f"push-*-v{version}.json")
    rows = [row for row in json.loads(path.read_text())["traceEvents"] if row["ph"] == "X"]
    names = {row["name"] for row in rows}
    assert {
        f"{step} {bucket}" for step in ("fill", "export", "load", "release") for bucket in range(report.buckets)
    } < names
    assert not [row for row in rows if row["args"].keys() & {"failed", "unfinished"}]
    ends = {row["name"]: row["ts"] + row["dur"] for row in rows}
    begins = {row["name"]: row["ts"] for row in rows}
    assert begins["fill 1"] < ends["load 0"], "work on two buckets overlaps"


def test_engines_generate_what_the_model_generates(node):
    import httpx

    model = load_checkpoint(node.checkpoint("B"))
    push(node, model)
    wanted = greedy(model, [5, 6, 7], 8)
    for engine in node.engines:
        body = {"prompt_ids": [5, 6, 7], "max_tokens": 8}
        got = httpx.post(f"{engine.url}/generate", json=body, timeout=30, trust_env=False).raise_for_status().json()
        assert got["token_ids"] == wanted


@pytest.mark.parametrize("kind", ["pairs", "generator", "checkpoint", "strided"])
def test_other_sources(node, kind):
    weights = node.weights("A")
    source = {
        "pairs": lambda: list(weights.items()),
        "generator": lambda: ((n, w.clone()) for n, w in weights.items()),
        "checkpoint": lambda: CheckpointSource(node.checkpoint("A")),
        "strided": lambda: {n: w.t().contiguous().t() if w.ndim == 2 else w for n, w in weights.items()},
    }[kind]()
    version, _ = push(node, source)
    node.assert_holds(weights, version)


@pytest.mark.parametrize("ranks", [slow(2), 3])
def test_fsdp2_ranks_push_their_shards(node, ranks, tmp_path):
    script = Path(__file__).with_name("fsdp2_push.py")
    first, second = next(node.versions), next(node.versions)
    arguments = [node.checkpoint("B"), node.daemon.endpoint, str(first), str(tmp_path)]
    trainer = node.fleet.torchrun(f"fsdp2-{ranks}", script, ranks, arguments)
    assert trainer.wait(150) == 0, trainer.tail(60)
    node.assert_holds(node.weights("B"), second)
    told = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(ranks)]
    assert all(t == told[0] for t in told), "every rank gets the same report"
    assert [r["complete"] for r in told[0]] == [True, True]


def test_a_push_in_the_background_lets_the_trainer_change_its_weights_once_filled(node):
    weights = node.weights("A")
    sent = {n: w.clone() for n, w in weights.items()}
    version = next(node.versions)
    handle = push_weights_async(sent, version=version, daemon=node.daemon.endpoint, timeout=30)
    handle.wait_filled(30)
    for tensor in sent.values():
        tensor.zero_()
    assert handle.result(30).complete
    assert handle.done()
    node.assert_holds(weights, version)


def test_a_part_of_the_weights_leaves_the_rest(node):
    push(node, node.weights("A"))
    changed = {"model.norm.weight": torch.full((64,), 2.0)}
    version, report = push(node, changed)
    node.assert_holds({**node.weights("A"), **changed}, version)
    assert all(e.not_pushed == len(node.weights("A")) - 1 for e in report.engines)


@pytest.mark.parametrize("nothing", [{}, {"model.norm.weight": torch.empty(0), "lm_head.weight": torch.empty(0, 64)}])
def test_a_push_of_nothing_is_refused(node, nothing):
    """Such as one whose pattern no tensor matches: the policy would stay what it is under another number."""
    version, _ = push(node, node.weights("A"))
    with pytest.raises(PushRefused, match="no rank has a tensor to push"):
        push_weights(nothing, version=version + 1, daemon=node.daemon.endpoint, timeout=10)
    node.assert_holds(node.weights("A"), version)


@pytest.mark.parametrize("pause", ["keep", "wait", "abort", "none"])
def test_every_way_to_pause(node, pause):
    version, _ = push(node, node.weights("B"), pause=pause)
    node.assert_holds(node.weights("B"), version)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w | {"model.layers.9.mlp.up_proj.weight": torch.zeros(2)}, "model.layers.9.mlp.up_proj.weight"),
        (lambda w: w | {"model.norm.weight": torch.zeros(65)}, "model.norm.weight"),
        (lambda w: w | {"model.norm.weight": torch.zeros(64, dtype=torch.float16)}, "model.norm.weight"),
    ],
)
def test_what_an_engine_cannot_take_is_refused_by_name_and_touches_nothing(node, change, words):
    version, _ = push(node, node.weights("A"))
    with pytest.raises(Exception, match=words.replace(".", r"\.")) as caught:
        push(node, change(node.weights("B")))
    assert type(caught.value).__name__ in ("PushRefused", "EngineRefused")
    node.assert_holds(node.weights("A"), version)


def test_versions_must_rise(node):
    version, _ = push(node, node.weights("A"))
    for stale in (version, version - 1):
        with pytest.raises(PushRefused, match=f"version {stale} is not above version {version}"):
            push_weights(node.weights("B"), version=stale, daemon=node.daemon.endpoint, timeout=10)
    node.assert_holds(node.weights("A"), version)


def test_an_unknown_model_is_refused_with_those_that_are_known(node):
    with pytest.raises(PushRefused, match="no engine serves model 'draft'") as caught:
        push_weights({}, version=1000, model="draft", daemon=node.daemon.endpoint, timeout=10)
    assert caught.value.hint == "models known here: default"


def test_bad_arguments_are_named_before_anything_is_sent(node):
    for options, words in (
        ({"version": -1}, "version"),
        ({"version": True}, "version"),
        ({"version": 1, "pause": "stop"}, "pause"),
        ({"version": 1, "timeout": 0}, "timeout"),
        ({"version": 1, "model": ""}, "model"),
    ):
        with pytest.raises(SourceError, match=words):
            push_weights({}, daemon=node.daemon.endpoint, **options)
    with pytest.raises(ConfigError, match="daemon"):
        push_weights({}, version=1, daemon="somewhere")


def test_where_no_daemon_listens_the_error_says_how_to_start_one(tmp_path):
    with pytest.raises(DaemonLost, match="no weightsyncd listens") as caught:
        push_weights({}, version=1, daemon=f"ipc://{tmp_path}/none.sock")
    assert "weightsyncd --node-config" in str(caught.value)
