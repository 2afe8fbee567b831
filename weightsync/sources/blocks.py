"""The arithmetic of scales: the engines' own operations, in the same order.

A block's greatest magnitude, `amax`, gives its scale, `amax / 448`; an element becomes `float8(x * (1 / scale))`. All
is float32 and rounded once, so the bits depend neither on how a tensor is cut into boxes nor on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from weightsync.sources.grid import strips

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.sources.grid import Grid

__all__ = ["amax_into", "quantise_into", "rows_at_a_time", "scales_of"]

_LARGEST = 448.0  # of float8_e4m3fn
_CHUNK = 1 << 22  # elements computed at a time, in float32: this bounds the memory taken
_LEAST_BLOCK, _LEAST_MATRIX = 1e-4, 1e-12  # the least amax that engines assume, of a block and of a whole matrix


def amax_into(amax: torch.Tensor, box: torch.Tensor, offset: Sequence[int], grid: Grid, sent: torch.dtype) -> None:
    """Raise `amax`, float32 of the grid's shape, to the magnitudes of a box at `offset`, rounded to `sent`.

    NaN stays NaN.
    """
    if not box.numel():
        return
    held = amax[grid.touched(offset, box.shape)]
    first = offset[-2] // grid.height
    count = held.shape[-1]
    left = offset[-1] % grid.width
    right = count * grid.width - left - box.shape[-1]
    for strip in strips(offset[-2], box.shape[-2], grid.height, rows_at_a_time(box.shape)):
        some = _split(box.narrow(-2, strip.start, strip.blocks * strip.rows), -2, strip.blocks)
        # Rounding keeps order, so only the greatest is rounded. abs() would copy everything.
        most = torch.maximum(some.amax(-2), -some.amin(-2)).to(sent).float()
        most = _split(torch.nn.functional.pad(most, (left, right)), -1, count).amax(-1)
        into = held.narrow(-2, strip.block - first, strip.blocks)
        into.copy_(torch.maximum(into, most.to(into.device)))


def scales_of(amax: torch.Tensor, grid: Grid, *, ue8m0: bool) -> torch.Tensor:
    """Compute the scale of each block from its greatest magnitude."""
    # Divide by a tensor: a GPU divides by a plain number by multiplying with its reciprocal, which gives another scale.
    scales = amax.clamp(min=_LEAST_MATRIX if grid.one else _LEAST_BLOCK) / amax.new_tensor(_LARGEST)
    if not ue8m0:
        return scales
    bits = scales.view(torch.int32)
    exponent = ((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0).int()
    return (exponent.clamp(1, 254) << 23).view(torch.float32)


def quantise_into(
    out: torch.Tensor, box: torch.Tensor, offset: Sequence[int], grid: Grid, scales: torch.Tensor, sent: torch.dtype
) -> None:
    """Write a box at `offset` into `out`, rounded to `sent` and divided by its blocks' scales.

    `scales` has those of all blocks. Computed on the GPU of `out`; if `out` is on none, where the box lies.
    """
    if not box.numel():
        return
    device = out.device if out.is_cuda else box.device
    by = 1.0 / scales[grid.touched(offset, box.shape)].to(device)
    if not grid.one:
        by = by.repeat_interleave(grid.width, dim=-1).narrow(-1, offset[-1] % grid.width, box.shape[-1])
    first = offset[-2] // grid.height
    for strip in strips(offset[-2], box.shape[-2], grid.height, rows_at_a_time(box.shape)):
        length = strip.blocks * strip.rows
        some = box.narrow(-2, strip.start, length).to(device, sent)
        made = (
            _split(some, -2, strip.blocks) * by.narrow(-2, strip.block - first, strip.blocks).unsqueeze(-2)
        ).flatten(-3, -2)
        out.narrow(-2, strip.start, length).copy_(made if made.device == out.device else made.to(out.dtype))


def _split(tensor: torch.Tensor, dim: int, count: int) -> torch.Tensor:
    """Return a view with dimension `dim` split in two, the first of length `count`."""
    split: torch.Tensor = tensor.unflatten(dim, (count, tensor.shape[dim] // count))  # type: ignore[no-untyped-call]
    return split


def rows_at_a_time(shape: Sequence[int]) -> int:
    """Return how many rows of a box of this shape are computed at a time, at least one."""
    row = 1
    for length in (*shape[:-2], shape[-1]):
        row *= max(1, length)
    return max(1, _CHUNK // row)
