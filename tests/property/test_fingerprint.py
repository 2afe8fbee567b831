"""Fingerprints add up over any partition of a tensor into boxes, and notice every changed byte."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plan_kit import window
from weightsync.fingerprint import combine, fingerprint


@st.composite
def partitions(draw):
    """Bytes of a tensor, [*shape, itemsize], and boxes that tile it."""
    shape = tuple(draw(st.lists(st.integers(1, 9), max_size=4)))
    itemsize = draw(st.sampled_from((1, 2, 4, 8)))
    boxes = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 5)) if shape else 0):
        offset, size = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, size[dim]))
        boxes.append((offset, (*size[:dim], cut, *size[dim + 1 :])))
        boxes.append(
            ((*offset[:dim], offset[dim] + cut, *offset[dim + 1 :]), (*size[:dim], size[dim] - cut, *size[dim + 1 :]))
        )
    seed = draw(st.integers(0, 99))
    return np.random.default_rng(seed).integers(0, 256, size=(*shape, itemsize), dtype=np.uint8), boxes


def of_box(data, offset, shape, strided):
    """The fingerprint of one box of bytes [*shape, itemsize]."""
    *global_shape, itemsize = data.shape
    if strided and shape:
        base = data.reshape(*global_shape[:-1], -1)
        last = slice(offset[-1] * itemsize, (offset[-1] + shape[-1]) * itemsize)
        given_as = base[(*window(offset[:-1], shape[:-1]), last)]
    else:
        given_as = np.ascontiguousarray(data[window(offset, shape)]).reshape(-1)
    return fingerprint(given_as, itemsize=itemsize, global_shape=tuple(global_shape), offset=offset, shape=shape)


@settings(deadline=None, max_examples=300)
@given(partitions(), st.booleans())
def test_adds_up(partition, strided):
    data, boxes = partition
    shape = data.shape[:-1]
    whole = of_box(data, (0,) * len(shape), shape, strided=False)
    assert 0 <= whole < 1 << 64
    assert combine(of_box(data, offset, size, strided) for offset, size in boxes) == whole


@settings(deadline=None, max_examples=200)
@given(partitions(), st.data())
def test_notices_any_byte_in_any_box(partition, draw):
    data, boxes = partition
    boxes = [box for box in boxes if math.prod(box[1])]
    offset, shape = draw.draw(st.sampled_from(boxes))
    before = of_box(data, offset, shape, strided=True)
    at = tuple(o + draw.draw(st.integers(0, n - 1)) for o, n in zip(offset, shape, strict=True))
    data[(*at, draw.draw(st.integers(0, data.shape[-1] - 1)))] ^= draw.draw(st.integers(1, 255))
    assert of_box(data, offset, shape, strided=True) != before


@settings(deadline=None, max_examples=100)
@given(partitions(), st.data())
def test_notices_rows_and_columns_in_each_others_place(partition, draw):
    data, _ = partition
    shape = data.shape[:-1]
    if not shape:
        return
    dim = draw.draw(st.integers(0, len(shape) - 1))
    one, other = draw.draw(st.integers(0, shape[dim] - 1)), draw.draw(st.integers(0, shape[dim] - 1))
    swapped = data.copy()
    index = (slice(None),) * dim
    swapped[(*index, [one, other])] = data[(*index, [other, one])]
    origin = (0,) * len(shape)
    same = np.array_equal(swapped, data)
    assert (of_box(swapped, origin, shape, strided=False) == of_box(data, origin, shape, strided=False)) == same
