"""Whatever boxes ranks expose and engine ranks want: what is drawn is what the tensors hold there."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import box_emulation
from weightsync.drawing.device import DeviceCopies
from weightsync.drawing.host import HostCopies
from weightsync.errors import CodecError, LocalProtocolError
from weightsync.plan.boxes import packed_strides
from weightsync.plan.draws import Draw, Wanted, draws, interleaved
from weightsync.plan.exposure import Exposure, Exposures, Part, Region
from weightsync.plan.table import TensorTable

_DTYPES = {1: "uint8", 2: "bfloat16", 4: "float32", 8: "int64"}


def cut(draw, shape, pieces):
    """Boxes that cover `shape`, each once."""
    boxes = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, pieces))):
        at = draw(st.integers(0, len(boxes) - 1))
        offset, size = boxes[at]
        dims = [d for d, n in enumerate(size) if n > 1]
        if not dims:
            continue
        dim = draw(st.sampled_from(dims))
        first = draw(st.integers(1, size[dim] - 1))
        rest = size[dim] - first
        boxes[at] = offset, (*size[:dim], first, *size[dim + 1 :])
        boxes.append(((*offset[:dim], offset[dim] + first, *offset[dim + 1 :]), (*size[:dim], rest, *size[dim + 1 :])))
    return boxes


def laid(draw, shape, itemsize):
    """Strides in bytes with the dimensions in any order and room between them, and the bytes that takes."""
    order = draw(st.permutations(range(len(shape))))
    strides, step = [0] * len(shape), itemsize
    for dim in order:
        strides[dim] = step
        step *= shape[dim] + draw(st.integers(0, 1))
    return tuple(strides), step


class _Case:
    def __init__(self, draw):
        count = draw(st.integers(1, 3))
        shapes = [tuple(draw(st.lists(st.integers(1, 6), max_size=3))) for _ in range(count)]
        sizes = [draw(st.sampled_from(sorted(_DTYPES))) for _ in range(count)]
        names = tuple(f"t{i}" for i in range(count))
        self.table = TensorTable(names=names, dtypes=tuple(_DTYPES[n] for n in sizes), shapes=tuple(shapes), aliases=())
        random = np.random.default_rng(draw(st.integers(0, 2**32)))
        ranks = draw(st.integers(1, 3))
        self.memory = [np.zeros(1 << 16, dtype=np.uint8) for _ in range(ranks)]
        ends = [0] * ranks
        parts: list[list[Part]] = [[] for _ in range(ranks)]
        self.tensors = []
        for index, (shape, size) in enumerate(zip(shapes, sizes, strict=True)):
            data = random.integers(0, 256, (*shape, size), dtype=np.uint8)
            self.tensors.append(data)
            for offset, box in cut(draw, shape, 4):
                rank = draw(st.integers(0, ranks - 1))
                strides, nbytes = laid(draw, box, size)
                at = ends[rank] + draw(st.integers(0, 5))
                part = Part(index, offset, box, 0, at, strides)
                parts[rank].append(part)
                view(self.memory[rank], at, box, strides, size)[...] = data[
                    tuple(slice(a, a + n) for a, n in zip(offset, box, strict=True))
                ]
                ends[rank] = at + nbytes
        region = Region(nbytes=1 << 16, name="x", fd=3)
        made = [Exposure.of(7, "1", [region] if some else [], some, self.table.width) for some in parts]
        told = Exposures.unpack(Exposures.of([one.packed for one in made]).pack())
        self.exposures = [Exposure.unpack(packed, self.table) for packed in told.ranks]
        assert [one.digest for one in self.exposures] == [one.digest for one in made]
        self.wanted, self.targets, end = [], np.zeros(1 << 16, dtype=np.uint8), 0
        for index, (shape, size) in enumerate(zip(shapes, sizes, strict=True)):
            for offset, box in cut(draw, shape, 3):
                if draw(st.booleans()):
                    strides, nbytes = laid(draw, box, size)
                    self.wanted.append(Wanted(index, offset, box, size, 0, end, strides))
                    end += nbytes

    @property
    def places(self):
        begins = [np.array([memory.ctypes.data], dtype=np.uint64).view(np.int64) for memory in self.memory]
        parts = [one.addresses(begin) for one, begin in zip(self.exposures, begins, strict=True)]
        return [self.targets.ctypes.data], parts

    def check(self):
        for want in self.wanted:
            found = view(self.targets, want.at, want.shape, want.strides, want.itemsize)
            inside = tuple(slice(a, a + n) for a, n in zip(want.offset, want.shape, strict=True))
            np.testing.assert_array_equal(found, self.tensors[want.tensor][inside])


def view(memory, at, shape, strides, itemsize):
    return np.ndarray((*shape, itemsize), np.uint8, memory.data, at, (*strides, 1))


cases = st.composite(lambda draw: _Case(draw))()


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    if box_emulation.COMPILER is None:
        pytest.skip("no C++ compiler to run the kernel with")
    return box_emulation.EmulatedKernel(box_emulation.library(tmp_path_factory.mktemp("boxes")))


@given(case=cases)
def test_what_is_drawn_is_what_is_held(case):
    HostCopies(interleaved(draws(case.wanted, case.exposures, case.table))).run(*case.places, deadline=0)
    case.check()


@given(case=cases)
def test_and_so_it_is_on_a_gpu(case, kernel):
    several = interleaved(draws(case.wanted, case.exposures, case.table))
    DeviceCopies(kernel, torch.device("cpu"), several).run(*case.places, deadline=0)
    case.check()


@given(case=cases)
def test_order_alone_is_what_interleaving_changes(case):
    several = draws(case.wanted, case.exposures, case.table)
    assert sorted(several) == sorted(interleaved(several))


def test_ranks_are_read_in_turn_by_bytes():
    """After each copy every rank is as far through its bytes as the others, to within its own next copy."""

    def draw(rank, elements):
        return Draw(rank, 0, 0, (4,), 0, 0, (4,), (elements,), 4)

    one, other, third = [draw(0, 10)] * 4, [draw(1, 20), draw(1, 60)], [draw(2, 30), draw(2, 5), draw(2, 5)]
    turns = interleaved([*one, *other, *third])
    assert [(each.rank, each.shape[0]) for each in turns] == [
        *((0, 10), (1, 20), (2, 30)),  # all at 0
        *((0, 10), (1, 60)),  # both at a quarter
        *((0, 10), (0, 10)),  # at a half and three quarters
        *((2, 5), (2, 5)),  # at three quarters, too, and seven eighths
    ]


def exposure(**changes):
    table = TensorTable(names=("w",), dtypes=("float32",), shapes=((4, 4),), aliases=())
    terms: dict[str, Any] = {
        "tensor": 0,
        "offset": (0, 0),
        "shape": (4, 4),
        "region": 0,
        "at": 0,
        "strides": packed_strides((4, 4), 4),
    }
    part = Part(**(terms | changes))
    return table, Exposure.of(7, "1", [Region(nbytes=64, name="x", fd=3)], [part], 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"tensor": 1},
        {"region": 1},
        {"at": 4},
        {"at": -4},
        {"shape": (5, 4)},
        {"offset": (1, 0)},
        {"offset": (-1, 0)},
        {"strides": (2**62, 4)},
        {"strides": (-16, 4)},
        {"strides": (20, 4)},
    ],
)
def test_an_exposure_that_would_be_read_beyond_its_memory_is_none(changes):
    table, made = exposure(**changes)
    with pytest.raises(CodecError):
        Exposure.unpack(made.packed, table)


@pytest.mark.parametrize("name", ["tensor", "region", "at", "offset", "shape", "strides"])
def test_columns_of_an_exposure_are_as_long_as_each_other(name):
    table, made = exposure()
    raw = msgspec.msgpack.decode(made.packed)
    with pytest.raises(CodecError, match="different lengths"):
        Exposure.unpack(msgspec.msgpack.encode(raw | {name: raw[name] * 2}), table)


def test_an_exposure_of_a_later_version_is_refused_as_a_whole():
    """What it says beyond what is known here may change what the rest means."""
    table, made = exposure()
    raw = msgspec.msgpack.decode(made.packed)
    region = raw["regions"][0] | {"compressed": True}
    for later in (raw | {"compressed": True}, raw | {"regions": [region]}):
        with pytest.raises(CodecError, match="compressed"):
            Exposure.unpack(msgspec.msgpack.encode(later), table)
    with pytest.raises(CodecError, match="compressed"):
        Exposures.unpack(msgspec.msgpack.encode({"format": 1, "ranks": [], "compressed": True}))


def test_what_is_exposed_twice_is_named():
    table, made = exposure(shape=(3, 4))
    _, whole = exposure()
    wanted = [Wanted(0, (0, 0), (4, 4), 4, 0, 0, (16, 4))]
    with pytest.raises(LocalProtocolError, match="all elements, and 12 of them twice, of 'w' are exposed"):
        draws(wanted, [made, whole], table)
    assert len(draws(wanted, [made, whole], table, all_of_it=False)) == 2


def test_what_nobody_exposes_is_named():
    table, made = exposure(shape=(3, 4))
    wanted = [Wanted(0, (0, 0), (4, 4), 4, 0, 0, (16, 4))]
    with pytest.raises(LocalProtocolError, match="4 elements of 'w' are exposed by no rank"):
        draws(wanted, [made], table)
