"""Engines that read the weights where the trainer has them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.e2e.test_push import push
from weightsync import push_weights_async
from weightsync.errors import PushAborted
from weightsync.testing import eventually
from weightsync.trainer.rank_memory import memory

pytestmark = pytest.mark.e2e


def drawn(report):
    return [engine.drawn for engine in report.engines]


def test_engines_draw_what_a_rank_exposes(node):
    for name in "BAB":
        weights = node.weights(name)
        version, report = push(node, weights, in_place=True)
        assert drawn(report) == [True, True]
        assert {e.checked for e in report.engines} == {len(weights)}
        assert report.bytes == sum(w.nbytes for w in weights.values())
        assert str(report).count("committed, in place") == 2
        node.assert_holds(weights, version)


def test_shards_of_several_ranks_are_drawn(node, tmp_path):
    script = Path(__file__).with_name("fsdp2_push.py")
    versions = [next(node.versions) for _ in range(2)]
    arguments = (node.checkpoint("A"), node.daemon.endpoint, str(versions[0]), str(tmp_path), "3", "in-place")
    assert node.fleet.torchrun("in-place", script, 3, arguments).wait(150) == 0
    reports = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(3)]
    assert reports[0] == reports[1] == reports[2]
    assert [[engine["drawn"] for engine in report["engines"]] for report in reports[0]] == [[True, True]] * 2
    node.assert_holds(node.weights("A"), versions[1])


def test_weights_of_another_type_are_exposed_as_they_are_sent(node):
    weights = {name: tensor.double() for name, tensor in node.weights("B").items()}
    version, report = push(node, weights, in_place=True, dtype=torch.float32)
    assert drawn(report) == [True, True]
    node.assert_holds(node.weights("B"), version)


def test_strided_weights_are_exposed(node):
    weights = {
        name: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor for name, tensor in node.weights("A").items()
    }
    version, report = push(node, weights, in_place=True)
    assert drawn(report) == [True, True]
    node.assert_holds(node.weights("A"), version)


def test_slots_and_places_take_turns(node):
    """And what was exposed for the one is given back with the other."""
    before = exposed()
    for name, in_place in zip("ABAB", (True, False, True, False), strict=True):
        version, report = push(node, node.weights(name), in_place=in_place)
        assert drawn(report) == [in_place] * 2
        node.assert_holds(node.weights(name), version)
    assert not exposed() - before


def exposed():
    """The memory that this process exposes, by its files."""
    links = [os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    return {link for link in links if link.startswith("/memfd:weightsync-")}


def test_a_handle_says_when_the_weights_may_change(node):
    weights = node.weights("B")
    version = next(node.versions)
    handle = push_weights_async(weights, version=version, daemon=node.daemon.endpoint, timeout=30, in_place=True)
    handle.wait_filled(30)
    for tensor in weights.values():
        tensor.zero_()
    assert drawn(handle.result(30)) == [True, True]
    node.assert_holds(node.weights("B"), version)


def test_memory_of_a_rank_that_has_ended_is_let_go(node, tmp_path):
    """Engines would else keep it from whoever needs it, until somebody pushes again."""
    script = Path(__file__).with_name("fsdp2_push.py")
    version = str(next(node.versions))
    next(node.versions)
    arguments = (node.checkpoint("A"), node.daemon.endpoint, version, str(tmp_path), "1", "in-place")
    assert node.fleet.torchrun("gone", script, 1, arguments).wait(150) == 0
    workers = [pid for engine in node.engines for pid in node.info(engine)["worker_pids"]]

    def mapped():
        return [pid for pid in workers if "/memfd:weightsync-" in Path(f"/proc/{pid}/maps").read_text()]

    assert eventually(lambda: not mapped())


def test_a_worker_that_cannot_map_the_memory_reads_slots(node, monkeypatch):
    """A container of its own, say: the exposing process is not to be seen from there."""
    monkeypatch.setattr("weightsync.exposing.host.started", lambda pid: "1")
    weights = node.weights("A")
    weights = {name: weights[name] for name in reversed(weights)}  # a layout that was not exposed before
    version, report = push(node, weights, in_place=True)
    assert drawn(report) == [False, False]
    node.assert_holds(weights, version)


def test_a_rank_that_cannot_expose_uses_slots(node, monkeypatch):
    def no_room(fd, offset, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("weightsync.exposing.host.os.posix_fallocate", no_room)
    memory()._exposed.clear()
    weights = node.weights("B")
    version, report = push(node, weights, in_place=True)
    assert drawn(report) == [False, False]
    node.assert_holds(weights, version)


def test_weights_that_change_while_they_are_drawn_are_found_out(node, monkeypatch):
    """The fingerprints are of what was exposed, and engines are compared with these."""
    from weightsync.exposing.host import HostExposing

    advance = HostExposing.advance

    def spoil(self):
        advance(self)
        if self.ready:
            self._exposed.memory[0] += 1

    monkeypatch.setattr(HostExposing, "advance", spoil)
    with pytest.raises(PushAborted, match="torn"):
        push(node, node.weights("A"), in_place=True)
    monkeypatch.undo()
    version, _ = push(node, node.weights("A"), in_place=True)
    node.assert_holds(node.weights("A"), version)
