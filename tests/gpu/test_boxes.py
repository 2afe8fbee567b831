"""The kernel on a GPU against numpy, with many threads and blocks, and between GPUs' address spaces."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weightsync.device.buckets import copied
from weightsync.device.launch import COPY, SUM, BoxKernel
from weightsync.device.table import BYTES, F32_TO_BF16, SLOT, Place, box_items, joined
from weightsync.fingerprint import fingerprint

DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bytes(box: torch.Tensor) -> np.ndarray:
    flat = torch.empty(box.numel(), dtype=box.dtype)
    flat.view(box.shape).copy_(box)
    return flat.view(torch.uint8).numpy()


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(step * tensor.element_size() for step in tensor.stride())


@pytest.mark.parametrize("seed", range(24))
def test_random_boxes_are_copied_and_summed_as_numpy_does(seed):
    """Several boxes of several tensors in one launch, aligned and not, transposed or not."""
    rng = np.random.default_rng(seed)
    kernel = BoxKernel(torch.device("cuda", 0))
    items, bases, wanted, checks, at = [], [], [], [], 0
    for total in range(6):
        itemsize = int(rng.choice([1, 2, 4, 8]))
        shape = tuple(int(n) for n in rng.integers(1, [60, 40, 50][: rng.integers(1, 4)]))
        if rng.random() < 0.4:
            shape = (*(min(n, 9) for n in shape[:-1]), 16 * int(rng.integers(1, 300)))
        tensor = torch.from_numpy(rng.integers(0, 256, int(np.prod(shape)) * itemsize, dtype=np.uint8))
        tensor = tensor.view(DTYPES[itemsize]).view(shape).cuda()
        if len(shape) > 1 and rng.random() < 0.3:
            tensor = tensor.transpose(0, -1).contiguous().transpose(0, -1)
        low = tuple(int(rng.integers(0, n)) if rng.random() < 0.5 else 0 for n in shape)
        size = tuple(
            int(rng.integers(1, n - a + 1)) if rng.random() < 0.5 else n - a for n, a in zip(shape, low, strict=True)
        )
        box = tensor[tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))]
        step = int(rng.choice([itemsize, 16, 256]))
        at = -(-at // step) * step + int(rng.integers(0, 3)) * itemsize
        src = Place(total, box.data_ptr() - tensor.data_ptr(), _strides(box))
        out = Place(SLOT, at, _strides(torch.empty(size, dtype=box.dtype)))
        items.append(box_items(size, itemsize, src, out, tensor_shape=shape, offset=low, total=total))
        bases.append(tensor)
        data = _bytes(box.cpu())
        checks.append((at, data))
        wanted.append(fingerprint(data, itemsize=itemsize, global_shape=shape, offset=low, shape=size))
        at += len(data)
    slot = torch.full((at + 64,), 0xAA, dtype=torch.uint8, device="cuda")
    pointers = torch.tensor([tensor.data_ptr() for tensor in bases], device="cuda")
    totals = torch.zeros(6, dtype=torch.int64, device="cuda")
    stream = torch.cuda.current_stream()
    kernel.launch(
        kernel.table(joined(items)), COPY | SUM, stream=stream, bases=pointers, slot=slot.data_ptr(), totals=totals
    )
    written = slot.cpu().numpy()
    clean = np.ones(len(written), dtype=bool)
    for begin, data in checks:
        assert np.array_equal(written[begin : begin + len(data)], data)
        clean[begin : begin + len(data)] = False
    assert (written[clean] == 0xAA).all(), "bytes beside the boxes were written"
    assert totals.cpu().numpy().view(np.uint64).tolist() == wanted


def test_float32_is_rounded_as_torch_does_on_a_gpu():
    bits = np.random.default_rng(0).integers(0, 2**32, 1 << 20, dtype=np.uint32)
    tensor = torch.from_numpy(bits.view(np.float32)).cuda()
    out = torch.zeros(len(bits), dtype=torch.bfloat16, device="cuda")
    kernel = BoxKernel(torch.device("cuda", 0))
    items = box_items(
        (len(bits),), 2, Place(0, 0, (4,)), Place(SLOT, 0, (2,)), tensor_shape=(len(bits),), offset=(0,), op=F32_TO_BF16
    )
    base = torch.tensor([tensor.data_ptr()], device="cuda")
    kernel.launch(kernel.table(items), COPY, stream=torch.cuda.current_stream(), bases=base, slot=out.data_ptr())
    assert torch.equal(out.view(torch.int16), tensor.to(torch.bfloat16).view(torch.int16))
    assert BYTES == 0


def test_copied_gives_what_lies_there():
    data = torch.arange(100_003, device="cuda").to(torch.uint8)
    assert torch.equal(copied(data.data_ptr() + 5, 99_000, data.device), data[5:99_005])
