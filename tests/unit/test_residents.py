"""Residents: which boxes of pushed tensors an engine's parameters have, told by the worker and read by the daemon."""

from __future__ import annotations

import itertools
import math

import msgspec
import pytest
import torch

from tests.hand_push import as_bytes, manifest_of
from weightsync.errors import CodecError
from weightsync.plan.boxes import packed_strides
from weightsync.plan.residents import ResidentBoxes
from weightsync.plan.table import TensorTable
from weightsync.replay.plan import Copy, LoadPlan
from weightsync.replay.residents import Residents, resident_box
from weightsync.replay.strided import Box

TABLE = TensorTable(names=("w", "v"), dtypes=("float32",) * 2, shapes=((4, 6), (5,)), aliases=())
TOLD = ResidentBoxes.of([(0, (0, 0), (4, 3)), (1, (2,), (3,))], 2, unseen=[1])


def test_what_is_told_is_what_is_read():
    read = ResidentBoxes.unpack(TOLD.pack(), TABLE)
    assert read.tensor.tolist() == [0, 1]
    assert read.offset.tolist() == [[0, 0], [2, 0]]
    assert read.shape.tolist() == [[4, 3], [3, 1]]
    assert read.unseen == {1}


@pytest.mark.parametrize(
    ("boxes", "unseen", "words"),
    [
        ([(2, (0, 0), (1, 1))], [], "a tensor that is not there"),
        ([(-1, (0, 0), (1, 1))], [], "a tensor that is not there"),
        ([(0, (0, 4), (4, 3))], [], "'w' is empty or does not lie"),
        ([(0, (-1, 0), (4, 3))], [], "'w' is empty or does not lie"),
        ([(0, (0, 6), (4, 0))], [], "'w' is empty or does not lie"),
        ([(0, (0, 0), (4, 6)), (1, (0, 0), (5, 2))], [], "'v' is empty or does not lie"),
        ([(0, (2**62, 0), (2**62, 1))], [], "'w' is empty or does not lie"),
        ([], [2], "parts of a tensor that is not there"),
        ([], [-1], "parts of a tensor that is not there"),
    ],
)
def test_boxes_of_nothing_are_refused(boxes, unseen, words):
    with pytest.raises(CodecError, match=words):
        ResidentBoxes.unpack(ResidentBoxes.of(boxes, 2, unseen=unseen).pack(), TABLE)


@pytest.mark.parametrize("change", ["tensor", "offset", "shape"])
def test_columns_are_of_one_length(change):
    raw = msgspec.msgpack.decode(TOLD.pack())
    with pytest.raises(CodecError, match="different lengths"):
        ResidentBoxes.unpack(msgspec.msgpack.encode(raw | {change: raw[change] * 2}), TABLE)


def plan(*copies: Copy) -> LoadPlan:
    return LoadPlan(
        copies=copies,
        fills=(),
        targets=("t",),
        by_loader={},
        untouched=(),
        sources=frozenset(copy.source for copy in copies),
        loader_sources={},
    )


def copy_of(source: str, dtype: torch.dtype, begin: int, count: int, to: torch.dtype = torch.float32) -> Copy:
    box = Box(begin * dtype.itemsize, (count,), (dtype.itemsize,))
    return Copy(source, box, dtype, "t", Box(0, (count,), (to.itemsize,)), to)


def test_a_tensor_of_which_a_part_is_converted_is_not_seen_whole():
    manifest = manifest_of(as_bytes([("w", torch.zeros(8)), ("v", torch.zeros(8))]), slot_bytes=1 << 16)
    index = manifest.tensors.index
    whole = Residents(plan(copy_of("w", torch.float32, 0, 4), copy_of("w", torch.float32, 4, 4)), manifest)
    assert (len(whole.held), whole.complete, whole.unseen) == (2, True, ())
    converted = copy_of("w", torch.float32, 4, 4, to=torch.bfloat16)
    part = Residents(plan(copy_of("w", torch.float32, 0, 4), converted, copy_of("v", torch.float32, 0, 8)), manifest)
    assert (len(part.held), part.complete, part.unseen) == (2, False, (index["w"],))
    every_other = copy_of("v", torch.float32, 0, 4)
    every_other = every_other._replace(source_box=Box(0, (4,), (8,)))
    assert Residents(plan(every_other), manifest).unseen == (index["v"],)


@pytest.mark.parametrize("shape", [(12,), (3, 4), (2, 6), (2, 2, 3), (4, 1, 3)])
def test_a_copy_is_told_in_its_tensors_dimensions_rightly_or_not_at_all(shape):
    tensor = Box(0, shape, packed_strides(shape, 1))
    elements = math.prod(shape)
    lengths, strides = (1, 2, 3, 4, 6, 12), (1, 2, 3, 4, 6)
    told = 0
    for offset, *dims in itertools.product(range(elements), *[lengths, strides] * 2):
        source = Box(offset, (dims[0], dims[2]), (dims[1], dims[3]))
        addresses = at(source)
        if max(addresses) >= elements or len(set(addresses)) < len(addresses):
            continue
        target = Box(1000, source.sizes, (100, 7))
        found = resident_box(shape, 1, source, target)
        if found is None:
            continue
        told += 1
        origin, onto = found
        box = Box(sum(o * s for o, s in zip(origin, tensor.strides, strict=True)), onto.sizes, tensor.strides)
        assert all(o + n <= length for o, n, length in zip(origin, onto.sizes, shape, strict=True)), source
        assert dict(zip(at(box), at(onto), strict=True)) == dict(zip(addresses, at(target), strict=True)), source
    assert told >= 50


def at(box: Box) -> list[int]:
    """Where its elements begin, in row-major order."""
    return [
        box.offset + sum(i * stride for i, stride in zip(index, box.strides, strict=True))
        for index in itertools.product(*map(range, box.sizes))
    ]
