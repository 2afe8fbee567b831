"""Pushes that contradict themselves, their engines or one another: refused alike on every rank, nothing touched."""

from __future__ import annotations

import threading
import time

import pytest

from tests.faults.kit import AT_ONCE, until
from tests.faults.stopwatch import Stopwatch
from weightsync.errors import PushAborted, PushRefused, SourceError, WeightSyncError
from weightsync.plan.layout import Layout, Shard
from weightsync.sources.tensors import TensorSource
from weightsync.sources.undescribed import Undescribed
from weightsync.trainer.place import TrainerPlace
from weightsync.trainer.rank import RankPush

pytestmark = pytest.mark.faults

Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"


def names(node):
    """The tensors of a checkpoint, as ranks share them: rank r of w has those at r, r + w, …"""
    return sorted(node.weights("C"))


def owner(node, name, world=2):
    return names(node).index(name) % world


def alike(ranks):
    """The error that every one of them raised, without how long it took."""
    errors = [rank.error() for rank in ranks]
    for error in errors:
        error.pop("seconds")
    assert all(error == errors[0] for error in errors), errors
    return errors[0]


def refused(node, error):
    """It is a refusal, and neither engine was touched or kept from serving."""
    assert error["kind"] == "PushRefused", error
    untouched(node)


def untouched(node):
    assert node.torn_or_whole(node.before) == set()
    node.wait_idle()
    assert not any(node.info(engine)["paused"] for engine in node.engines)


@pytest.mark.parametrize(("change", "theirs"), [("shape", "float32 (7, 3)"), ("dtype", "float16")])
def test_ranks_that_describe_a_tensor_differently(node, change, theirs):
    ranks = node.start_ranks(2)
    other = 1 - owner(node, Q)
    node.push_all(ranks, node.next_version(), only={other: {"change": {Q: change}}})
    error = alike(ranks)
    refused(node, error)
    weight = node.weights("C")[Q]
    ours = f"{str(weight.dtype).removeprefix('torch.')} {tuple(weight.shape)}"
    if change == "dtype":
        theirs = f"{theirs} {tuple(weight.shape)}"
    words = {owner(node, Q): f"{ours} on rank {owner(node, Q)}", other: f"{theirs} on rank {other}"}
    assert error["message"] == f"tensor '{Q}' is {words[0]} and {words[1]}"
    assert error["rank"] == 1
    assert "every rank must describe the same tensors" in error["hint"]


class Piecewise(TensorSource):
    """Holds rows of one tensor and says so; the rest of its weights whole."""

    def __init__(self, weights, name, whole, first):
        super().__init__(weights)
        plain = super().layout()
        held = []
        for at, place in enumerate(plain.tensor):
            this = plain.tensors.names[place]
            shape = plain.tensors.shapes[place]
            cut = this == name
            offset = (first,) + (0,) * (len(shape) - 1) if cut else (0,) * len(shape)
            held.append(Shard(this, plain.tensors.dtypes[place], whole if cut else shape, offset, shape))
            assert int(place) == at
        self._piecewise = Layout.of(held)

    def layout(self):
        return self._piecewise


def push_rows(node, rows):
    """A push by ranks of this process: rank r holds `rows[r]` of Q. Returns the error of all."""
    weights = node.weights("C")
    shape = tuple(weights[Q].shape)
    sources = [Piecewise({Q: weights[Q][begin:end].contiguous()}, Q, shape, begin) for begin, end in rows]
    errors, _ = push_sources(node, sources)
    assert isinstance(errors[0], PushRefused)
    return errors[0].record()


def push_sources(node, sources, first=None):
    """A push by ranks of this process, rank r of `sources[r]`; all raise the same. Rank `first` calls before others.
    Returns the errors by rank, and how many seconds it took.
    """
    version = node.next_version()
    errors: dict[int, WeightSyncError] = {}

    def call(rank, source):
        started = time.monotonic()
        push = RankPush(
            source,
            place=TrainerPlace("rows", rank, len(sources)),
            version=version,
            model="default",
            endpoint=node.daemon.endpoint,
            pause="keep",
            started=started,
            deadline=started + 20,
        )
        with pytest.raises(WeightSyncError) as caught:
            push.run()
        errors[rank] = caught.value

    threads = [threading.Thread(target=call, args=each) for each in enumerate(sources)]
    if first is not None:
        threads.insert(0, threads.pop(first))
    watch = Stopwatch()
    for thread in threads:
        thread.start()
        if first is not None:
            until(lambda: node.push_state() is not None or 0 in errors or 1 in errors, "it has called")
    for thread in threads:
        thread.join(30)
    seconds = watch.seconds
    records = [errors[rank].record() for rank in range(len(sources))]
    assert all(record == records[0] for record in records), records
    untouched(node)
    return errors, seconds


@pytest.mark.parametrize("first", [0, 1])
def test_a_rank_whose_weights_cannot_be_described(node, first):
    """The others hear of it, whether they have called before or call after it."""
    weights = node.weights("C")
    sources = [TensorSource(weights), Undescribed(SourceError(f"tensor {Q!r} is on the meta device: it has no data"))]
    errors, seconds = push_sources(node, sources, first)
    assert seconds < AT_ONCE
    assert isinstance(errors[0], PushAborted)
    assert errors[0].message == f"trainer rank 1 failed: tensor {Q!r} is on the meta device: it has no data"
    assert errors[0].rank == 1


def test_elements_that_no_rank_holds(node):
    record = push_rows(node, [(0, 20), (30, 64)])
    assert f"tensor '{Q}' of shape (64, 64): 640 elements, the first at (20, 0), are held by no rank" in record.message
    assert "rank 0 holds shape (20, 64) at offset (0, 0)" in record.message
    assert "rank 1 holds shape (34, 64) at offset (30, 0)" in record.message
    assert record.hint is not None


def test_elements_that_two_ranks_hold_differently(node):
    record = push_rows(node, [(0, 40), (30, 64)])
    assert f"tensor '{Q}' of shape (64, 64)" in record.message
    assert "which overlap" in record.message
    assert record.rank == 1


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("model.layers.0.self_attn.q_prj.weight", "add", f"this engine has no such tensor; it has {Q}"),
        (K, "shape", "shape [7, 3], but this engine's is [32, 64]"),
        (K, "dtype", "dtype float16, but this engine's is"),
    ],
)
def test_weights_that_the_engine_does_not_have(node, name, change, words):
    ranks = node.start_ranks(2)
    rank = owner(node, name) if name == K else 0
    node.push_all(ranks, node.next_version(), only={rank: {"change": {name: change}}})
    error = alike(ranks)
    refused(node, error)
    assert error["engine"] in ("e1", "e2")
    assert f"engine {error['engine']} cannot take these weights: {name}: {words}" in error["message"]


@pytest.mark.parametrize("behind", [0, 1])
def test_versions_must_rise(node, behind):
    served = node.info(node.engines[0])["weight_version"]
    ranks = node.start_ranks(2)
    node.push_all(ranks, served - behind)
    error = alike(ranks)
    refused(node, error)
    assert f"version {served - behind} is not above version {served}, which engine e" in error["message"]
    assert "versions must rise" in error["hint"]


@pytest.mark.parametrize(
    ("differ", "words"),
    [
        ({"version": 10**6}, "version 1000000, not"),
        ({"world": 3}, "world size 3, not 2"),
        ({"pause": "abort"}, "pause 'abort', not 'keep'"),
        ({"model": "another"}, "model 'another', not 'default'"),
    ],
)
def test_ranks_that_disagree_about_the_push(node, differ, words):
    ranks = node.start_ranks(2)
    version = node.next_version()
    ranks[0].push(**node.terms(0, 2, version=version))
    node.wait_state("opening")
    ranks[1].push(**{**node.terms(1, 2, version=version), **differ})
    error = alike(ranks)
    refused(node, error)
    assert words in error["message"]
    assert "as the ranks before it" in error["message"]
    assert (error["rank"], error["version"]) == (1, version)


def test_a_rank_beyond_the_world(node):
    ranks = node.start_ranks(2)
    version = node.next_version()
    ranks[0].push(**node.terms(0, 2, version=version))
    node.wait_state("opening")
    ranks[1].push(**node.terms(2, 2, version=version))
    error = alike(ranks)
    refused(node, error)
    assert error["message"] == "rank 2 is not in a world of 2, whose ranks are 0 to 1"


def test_ranks_that_never_call_are_named_in_time(node):
    ranks = node.start_ranks(2)
    node.push_once(ranks)
    version, started, watch = node.next_version(), time.monotonic(), Stopwatch()
    for number, rank in zip((1, 3), ranks, strict=True):
        rank.push(**node.terms(number, 4, version=version, timeout=1.5))
    error = alike(ranks)
    assert time.monotonic() - started > 1.4
    assert watch.seconds < 1.5 + AT_ONCE
    assert (error["kind"], error["rank"], error["phase"]) == ("PushTimeout", 0, "open")
    assert "ranks 0, 2 of 4 to call push_weights" in error["message"]
    untouched(node)


@pytest.mark.parametrize("group", ["another trainer", "trainer"])
def test_a_second_push_at_the_same_time_is_refused_at_once(node, group):
    *ranks, second = node.start_ranks(3)
    node.push_all(ranks, node.next_version(), only={1: {"gate": ["read", 3]}})
    ranks[1].wait_at("read")
    second.push(**node.terms(0, 1 if group != "trainer" else 2, version=node.next_version(), group=group))
    error = second.error()
    assert error["kind"] == "PushRefused"
    assert error["seconds"] < AT_ONCE
    if group == "trainer":
        assert "rank 0 of this trainer takes part in the push already" in error["message"]
    else:
        assert "by another trainer is under way" in error["message"]
        assert "try again" in error["hint"]
    ranks[1].go()
    assert all(rank.report()["complete"] for rank in ranks)
    for engine in node.engines:
        node.serves(engine, "C")
    # and once that has ended, the second is welcome
    node.wait_idle()
    second.push(**node.terms(0, 1, version=node.next_version(), group="another trainer"))
    assert second.report()["complete"]


def test_a_model_that_no_engine_serves(node):
    ranks = node.start_ranks(2)
    node.push_all(ranks, node.next_version(), model="nobody's")
    error = alike(ranks)
    refused(node, error)
    assert 'no engine serves model "nobody\'s"' in error["message"]
    assert error["hint"] == "models known here: default"


@pytest.mark.slow  # twice in whole runs, and never alone, a fresh rank was silent in it for longer than `liveness`
def test_a_source_that_breaks_half_way(node):
    """Rank 1 holds one late tensor alone: when it cannot be read, engines have loaded what rank 0 holds."""
    late = "model.norm.weight"
    mine = names(node)[owner(node, late) :: 2]
    ranks = node.start_ranks(2)
    terms = {"broken": True, "gate": ["read", 0], "change": {name: "drop" for name in mine if name != late}}
    node.push_all(ranks, node.next_version(), only={owner(node, late): terms})
    ranks[owner(node, late)].wait_at("read")
    for engine in node.engines:
        node.wait_torn(engine)
    ranks[owner(node, late)].go()
    error = alike(ranks)
    assert (error["kind"], error["rank"], error["phase"]) == ("PushAborted", owner(node, late), "fill")
    assert "the weights cannot be read" in error["message"]
    assert "torn and paused: e1, e2" in error["message"]
    assert node.torn_or_whole(node.before) == {"e1", "e2"}
