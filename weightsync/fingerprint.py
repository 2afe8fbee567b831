"""A 64-bit fingerprint of a tensor's bytes that adds up over any partition of the tensor into boxes.

Every trainer rank fingerprints the boxes that it sends, every engine rank the boxes that it holds. The sums (mod 2^64)
agree if the bytes do, however differently the two sides cut the tensor, and no process needs to hold all of it. The
definition is fixed for good, because peers of different versions compare fingerprints:

    A tensor is rows along dimension 0; a tensor of no or one dimension is a single row. Each row's bytes, in row-major
    order and padded with zeros, are little-endian words of 8 bytes.
    F = sum over rows r and words c of A(r) * B(c) * word[r, c]  mod 2^64
    B(c) = splitmix64(c) | 1,  A(r) = splitmix64(2^63 + r) | 1,  splitmix64(i) the i-th output for seed 0

Any single changed byte changes F, since A and B are odd. Any other difference goes unseen with a chance of about 2^-60.
It guards against mistakes, not against forgers. Pure numpy: the common case is one `einsum` at about memory speed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsync.plan.boxes import box_runs, splitmix64

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    Words = npt.NDArray[np.uint64]
    Bytes = npt.NDArray[np.uint8]

__all__ = ["bucket_sum", "combine", "fingerprint"]

_MASK = (1 << 64) - 1
_BLOCK = 1 << 15  # words of one step if bytes must be padded: they stay in a core's second-level cache (256 KiB)
_ALIGNED_BLOCK = 1 << 18  # words of one step otherwise: memory is fastest for long streams
_STEP_ROWS = 1 << 20
_COPIED_STEP = 1 << 24  # bytes copied at a time if the memory layout, or runs of several phases, force a copy
_TABLE = 1 << 21  # words; coefficients beyond these are computed each time, at about 1 GB/s


def combine(parts: Iterable[int]) -> int:
    """Return the fingerprint of disjoint boxes together, from the fingerprint of each."""
    return sum(parts) & _MASK


def bucket_sum(tensors: npt.NDArray[np.integer[Any]], fingerprints: Words) -> int:
    """Return a bucket's checksum, from the fingerprints of its pieces and their tensors' indices in the manifest.

    Checksums add up over parts as fingerprints do. Each is weighted by its tensor, so that swapped pieces are noticed.
    """
    weights = splitmix64(tensors.astype(np.uint64)) | np.uint64(1)
    return int((weights * fingerprints).sum(dtype=np.uint64))


def fingerprint(
    data: Bytes, *, itemsize: int, global_shape: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...]
) -> int:
    """Return what the box `shape` at `offset` (elements) contributes to the fingerprint of a tensor of `global_shape`.

    `data` is uint8 and holds the box's bytes in row-major order: either one-dimensional and contiguous, or of shape
    `(*shape[:-1], shape[-1] * itemsize)` with any strides. Nothing is copied if its last dimension is contiguous and
    the box's rows begin and end on words of the tensor; otherwise a bounded amount is copied at a time. Raises
    `ValueError` if shapes and bytes do not fit each other.
    """
    if not len(global_shape) == len(offset) == len(shape) or any(
        o < 0 or s < 0 or o + s > g for o, s, g in zip(offset, shape, global_shape, strict=True)
    ):
        raise ValueError(f"box {shape} at {offset} does not lie in a tensor of shape {global_shape}")
    nbytes = math.prod(shape) * itemsize
    if data.dtype != np.uint8 or data.shape not in ((nbytes,), (*shape[:-1], *(s * itemsize for s in shape[-1:]))):
        raise ValueError(f"box {shape} of {itemsize}-byte elements is not {data.dtype} of shape {data.shape}")
    if not data.size:
        return 0
    if len(shape) < 2:
        rows, first_row = 1, 0
        dims, low, count = global_shape or (1,), offset or (0,), shape or (1,)
    else:
        rows, first_row = shape[0], offset[0]
        dims, low, count = global_shape[1:], offset[1:], shape[1:]
    starts, length = box_runs(dims, low, count, itemsize)
    if data.ndim == 1 or data.flags.c_contiguous:
        data = data.reshape(rows, -1)
    one = data[:1].reshape(1, len(starts), length)
    copied = not np.may_share_memory(one, data) or (len(starts) > 1 and bool(((starts - starts[0]) % 8).any()))
    step = max(1, min(_STEP_ROWS, _COPIED_STEP // one.size)) if copied else _STEP_ROWS
    total = 0
    for row in range(0, rows, step):
        some = data[row : row + step].reshape(-1, len(starts), length)
        total += _sum(some, starts, first_row + row)
    return total & _MASK


def _sum(data: Bytes, starts: npt.NDArray[np.int64], first_row: int) -> int:
    """Return the sum for rows of equally long runs: `data` [rows, runs, bytes]."""
    sums = np.zeros(len(data), dtype=np.uint64)
    if len(starts) == 1:
        _add_runs(sums, data, starts // 8, int(starts[0]) % 8)
    else:
        phases = starts % 8
        for phase in np.unique(phases).tolist():
            some = np.flatnonzero(phases == phase)
            _add_runs(sums, data if len(some) == len(starts) else data[:, some], starts[some] // 8, phase)
    return int((sums * _ROWS.stretch(first_row, len(data))).sum(dtype=np.uint64))


def _add_runs(sums: Words, data: Bytes, words: npt.NDArray[np.int64], phase: int) -> None:
    """Add runs that all start `phase` bytes into a word, run m in word `words[m]`, to each row's sum."""
    _, runs, length = data.shape
    aligned = phase == 0 and length % 8 == 0 and data.strides[2] == 1
    block = _ALIGNED_BLOCK if aligned else _BLOCK
    # A long run is cut where words of the tensor begin; short runs are taken several at a time.
    for cut in range(0, phase + length, 8 * block):
        begin, end = max(0, cut - phase), min(length, cut + 8 * block - phase)
        lead = phase if cut == 0 else 0
        width = (lead + end - begin + 7) // 8
        several = max(1, block // width)
        for run in range(0, runs, several):
            coefficients = _COLUMNS.stretches(words[run : run + several] + cut // 8, width)
            part = data[:, run : run + several, begin:end]
            if aligned:
                sums += np.einsum("rmc,mc->r", part.view("<u8"), coefficients)
            else:
                _add_padded(sums, part, lead, coefficients)


def _add_padded(sums: Words, part: Bytes, lead: int, coefficients: Words) -> None:
    """Add runs to each row's sum. A run's words are `lead` zero bytes, then its own; `coefficients` [runs, words]."""
    rows, runs, length = part.shape
    width = coefficients.shape[1]
    step = max(1, _BLOCK // (runs * width))
    padded = np.zeros((min(step, rows), runs, 8 * width), dtype=np.uint8)
    for row in range(0, rows, step):
        some = part[row : row + step]
        padded[: len(some), :, lead : lead + length] = some
        flat = padded[: len(some)].view("<u8").reshape(len(some), -1)
        sums[row : row + step] += np.einsum("rc,c->r", flat, coefficients.reshape(-1))


class _Coefficients:
    """The generator's outputs from `base` on, made odd. A table keeps the first of them, and grows on demand."""

    def __init__(self, base: int) -> None:
        self._base = np.uint64(base)
        self._table: Words = np.empty(0, dtype=np.uint64)

    def _made(self, index: npt.NDArray[np.int64]) -> Words:
        made: Words = splitmix64(index.astype(np.uint64) + self._base) | np.uint64(1)
        return made

    def _beginning(self, need: int) -> Words | None:
        table = self._table  # two threads may both grow it: each uses its own table, with the same entries
        if len(table) < need <= _TABLE:
            table = self._table = self._made(np.arange(min(_TABLE, max(1024, 1 << (need - 1).bit_length()))))
        return table if need <= len(table) else None

    def stretch(self, first: int, count: int) -> Words:
        """Return the coefficients first, first + 1, …; [count]."""
        table = self._beginning(first + count)
        return self._made(np.arange(first, first + count)) if table is None else table[first : first + count]

    def stretches(self, first: npt.NDArray[np.int64], count: int) -> Words:
        """Return several stretches, [len(first), count]."""
        if len(first) == 1:
            return self.stretch(int(first[0]), count)[None]
        table = self._beginning(int(first.max()) + count)
        index = first[:, None] + np.arange(count)
        return self._made(index) if table is None else table[index]


_COLUMNS = _Coefficients(0)  # B
_ROWS = _Coefficients(1 << 63)  # A
