"""Slots in host memory as a rank fills them."""

from __future__ import annotations

import threading

import pytest
import torch

from weightsync.filling.host import HostFill
from weightsync.filling.program import compile_program
from weightsync.fingerprint import fingerprint
from weightsync.ipc.arena import Arena
from weightsync.plan.buckets import plan_push
from weightsync.sources.tensors import TensorSource

W = torch.arange(32.0).reshape(8, 4)


class Failing(TensorSource):
    """Has a weight that cannot be copied. Whoever reads it for a fingerprint still does so when that has failed."""

    def __init__(self) -> None:
        super().__init__({"w": W})
        self.reading, self.done = threading.Event(), threading.Event()

    def read_into(self, shard, src_offset, shape, out):
        assert self.reading.wait(10)
        raise RuntimeError("no such weight")

    def box_bytes(self, shard, src_offset, shape):
        self.reading.set()
        self.done.wait(0.2)  # which nobody sets so far: reading takes its time
        self.done.set()
        return super().box_bytes(shard, src_offset, shape)


def programs(*sources):
    layouts = [source.layout() for source in sources]
    plan = plan_push(layouts, slot_bytes=4096, owners=1)
    pairs = zip(layouts, plan.fills, strict=True)
    return [compile_program(b"plan", plan.manifest, layout, fills) for layout, fills in pairs]


@pytest.fixture
def arena(tmp_path):
    with Arena.create(node="fill", bridge=0, slots=1, slot_bytes=4096, directory=str(tmp_path)) as made:
        yield made


def test_a_bucket_is_full_when_it_was_begun(arena):
    (program,) = programs(source := TensorSource({"w": W}))
    filling = HostFill(source, program, [arena])
    filling.begin(0, 0, 0)
    assert bytes(arena.slot(0)[: W.nbytes]) == W.numpy().tobytes()
    (filled,) = filling.finished()
    expected = fingerprint(W.view(torch.uint8).numpy(), itemsize=4, global_shape=(8, 4), offset=(0, 0), shape=(8, 4))
    assert (filled.bucket, filled.nbytes, filled.sums) == (0, W.nbytes, {0: expected})
    assert not filling.busy


def test_nothing_reads_weights_once_filling_has_failed(arena):
    (program,) = programs(source := Failing())
    with pytest.raises(RuntimeError, match="no such weight"):
        HostFill(source, program, [arena]).begin(0, 0, 0)
    assert source.done.is_set()


def test_what_another_replica_writes_does_not_count():
    first, other = programs(TensorSource({"w": W, "v": W + 1}), TensorSource({"w": W, "v": W + 1}))
    assert sorted((first.nbytes, other.nbytes)) == [W.nbytes, W.nbytes]
    alone, nothing = programs(TensorSource({"w": W}), TensorSource({"w": W}))
    assert sorted((alone.nbytes, nothing.nbytes)) == [0, W.nbytes]
