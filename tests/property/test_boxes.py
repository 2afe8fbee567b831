"""The kernel's items, run on this processor: every byte in its place, every fingerprint as numpy computes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import box_emulation
from weightsync.device.table import BYTES, CHUNK, F32_TO_BF16, ITEM, SLOT, Place, box_items, joined
from weightsync.fingerprint import fingerprint

if TYPE_CHECKING:
    import ctypes

pytestmark = pytest.mark.skipif(box_emulation.COMPILER is None, reason="no C++ compiler to run the kernel with")
COPY, SUM = 1, 2
THREADS = [1, 3, 32, 512]  # of a block


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return box_emulation.library(tmp_path_factory.mktemp("boxes"))


@st.composite
def boxes(draw):
    """A tensor's shape, and a box's offset and shape in it."""
    shape = tuple(draw(st.lists(st.integers(1, 9), max_size=4)))
    if shape and draw(st.booleans()):
        shape = (*shape[:-1], draw(st.sampled_from([16, 24, 33, 64])))
    low = tuple(draw(st.integers(0, n - 1)) for n in shape)
    return shape, low, tuple(draw(st.integers(1, n - a)) for n, a in zip(shape, low, strict=True))


def _bytes(box: torch.Tensor) -> np.ndarray:
    flat = torch.empty(box.numel(), dtype=box.dtype)
    flat.view(box.shape).copy_(box)
    return flat.view(torch.uint8).numpy()


def _place(base: int, tensor: torch.Tensor, whole: torch.Tensor) -> Place:
    size = tensor.element_size()
    return Place(base, tensor.data_ptr() - whole.data_ptr(), tuple(s * size for s in tensor.stride()))


@given(
    data=st.data(),
    itemsize=st.sampled_from([1, 2, 4, 8]),
    transposed=st.booleans(),
    threads=st.sampled_from(THREADS),
)
@settings(deadline=None, max_examples=200)
def test_a_box_is_copied_and_summed_as_numpy_does(kernel, data, itemsize, transposed, threads):
    shape, low, size = data.draw(boxes())
    dtype = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[itemsize]
    numel = int(np.prod(shape))
    tensor = torch.from_numpy(np.random.default_rng(numel).integers(0, 256, numel * itemsize, dtype=np.uint8))
    tensor = tensor.view(dtype).view(shape)
    if transposed and len(shape) > 1:  # the same values, in another order in memory
        tensor = tensor.transpose(0, -1).contiguous().transpose(0, -1)
    box = tensor[tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))]
    pad = itemsize * data.draw(st.integers(0, 3))
    slot = torch.full((pad + numel * itemsize + 64,), 0xAA, dtype=torch.uint8)
    out = slot[pad : pad + box.numel() * itemsize].clone().view(dtype)  # for its strides only
    strides = tuple(s * itemsize for s in out.view(size).stride())
    items = box_items(
        size, itemsize, _place(0, box, tensor), Place(SLOT, pad, strides), tensor_shape=shape, offset=low, total=1
    )
    sums = box_emulation.run(kernel, items, [tensor.data_ptr()], 2, COPY | SUM, slot.data_ptr(), threads)
    assert torch.equal(slot[pad : pad + box.numel() * itemsize], torch.from_numpy(_bytes(box)))
    assert bool((slot[:pad] == 0xAA).all()), "bytes before the box were written"
    assert bool((slot[pad + box.numel() * itemsize :] == 0xAA).all()), "bytes after the box were written"
    wanted = fingerprint(_bytes(box), itemsize=itemsize, global_shape=shape, offset=low, shape=size)
    assert sums == [0, wanted]
    only = box_items(size, itemsize, _place(0, box, tensor), None, tensor_shape=shape, offset=low)
    assert box_emulation.run(kernel, only, [tensor.data_ptr()], 1, SUM, threads=threads) == [wanted]


@given(data=st.data(), threads=st.sampled_from(THREADS))
@settings(deadline=None, max_examples=60)
def test_float32_is_rounded_to_bfloat16_as_torch_does(kernel, data, threads):
    shape, low, size = data.draw(boxes())
    numel = int(np.prod(shape))
    bits = np.random.default_rng(numel).integers(0, 2**32, numel, dtype=np.uint32)
    bits[::7] = 0x7F800000  # infinity
    tensor = torch.from_numpy(bits.view(np.float32)).view(shape)
    tensor = torch.where(tensor.isnan(), 0.0, tensor)  # NaNs are a matter of their own
    box = tensor[tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))]
    wanted = box.to(torch.bfloat16)
    out = torch.zeros(size, dtype=torch.bfloat16)
    place = Place(SLOT, 0, tuple(2 * s for s in out.stride()))
    items = box_items(size, 2, _place(0, box, tensor), place, tensor_shape=shape, offset=low, op=F32_TO_BF16)
    sums = box_emulation.run(kernel, items, [tensor.data_ptr()], 1, COPY | SUM, out.data_ptr(), threads)
    assert torch.equal(out.view(torch.int16), wanted.view(torch.int16))
    assert sums == [fingerprint(_bytes(wanted), itemsize=2, global_shape=shape, offset=low, shape=size)]


def test_a_nan_stays_one(kernel):
    tensor = torch.from_numpy(np.array([0x7F800001, 0xFFFFFFFF] * 8, dtype=np.uint32).view(np.float32))
    out = torch.zeros(16, dtype=torch.bfloat16)
    items = box_items(
        (16,), 2, Place(0, 0, (4,)), Place(SLOT, 0, (2,)), tensor_shape=(16,), offset=(0,), op=F32_TO_BF16
    )
    box_emulation.run(kernel, items, [tensor.data_ptr()], 1, COPY, out.data_ptr())
    assert bool(out.isnan().all())


@pytest.mark.parametrize("threads", [1, 512])
@pytest.mark.parametrize(
    ("shape", "low", "size"),
    [
        ((3 * CHUNK,), (5,), (2 * CHUNK,)),
        ((3, 2 * CHUNK), (1, 3), (2, CHUNK + 7)),
        ((40, 12_288), (3, 0), (37, 12_288)),  # what engines have: whole rows of a matrix
        ((40, 12_288), (3, 4096), (37, 2_056)),
        ((16, 12, 1024), (0, 0, 0), (16, 12, 1024)),
        ((9, 300, 64), (2, 8, 0), (7, 200, 64)),
        ((2000, 64), (5, 0), (1995, 64)),  # several rows at a time
    ],
)
def test_long_runs_are_cut(kernel, shape, low, size, threads):
    tensor = torch.arange(int(np.prod(shape)), dtype=torch.int64).to(torch.int16).view(shape)
    box = tensor[tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))]
    out = torch.zeros(size, dtype=torch.int16)
    place = Place(SLOT, 0, tuple(2 * s for s in out.stride()))
    items = box_items(size, 2, _place(0, box, tensor), place, tensor_shape=shape, offset=low)
    assert int((items["row_bytes"].astype(np.int64) * items["rows"]).max()) <= CHUNK
    assert len(items) > 1
    sums = box_emulation.run(kernel, items, [tensor.data_ptr()], 1, COPY | SUM, out.data_ptr(), threads)
    assert torch.equal(out, box)
    assert sums == [fingerprint(_bytes(box), itemsize=2, global_shape=shape, offset=low, shape=size)]


def test_an_empty_box_is_no_work(kernel):
    assert len(box_items((0, 4), 2, Place(0, 0, (8, 2)), None, tensor_shape=(3, 4), offset=(0, 0))) == 0
    assert len(joined([])) == 0
    assert joined([]).dtype == ITEM
    assert ITEM.itemsize == 80
    assert BYTES == 0
