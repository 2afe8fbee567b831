"""However a matrix is cut and in whatever boxes it is read, what is sent of it is the whole matrix, quantised."""

from __future__ import annotations

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.quantise_kit import plainly
from weightsync.sources import Fp8, Part, PartSource
from weightsync.sources.grid import Grid, strips
from weightsync.sources.quantised import QuantisedSource

BLOCKS = st.none() | st.tuples(st.integers(1, 9), st.integers(1, 9))


def cuts(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    """Stretches that are all of a length, some perhaps empty."""
    edges = sorted(draw(st.lists(st.integers(0, length), max_size=3)))
    return list(zip([0, *edges], [*edges, length], strict=True))


@st.composite
def boxed(draw: st.DrawFn):
    """A shape and boxes that tile it."""
    shape = draw(st.tuples(st.integers(1, 30), st.integers(1, 30)) | st.tuples(*[st.integers(1, 12)] * 3))
    boxes: list[tuple[tuple[int, int], ...]] = [()]
    for length in shape:
        boxes = [(*box, stretch) for box in boxes for stretch in cuts(draw, length)]
    return shape, [(tuple(a for a, _ in box), tuple(b - a for a, b in box)) for box in boxes]


@given(boxed(), BLOCKS, st.sampled_from(["float32", "bfloat16", "float16"]), st.booleans(), st.integers(0, 99))
@example(((300, 260), [((0, 0), (150, 260)), ((150, 0), (150, 260))]), (128, 128), "bfloat16", False, 0)
def test_any_parts_in_any_boxes(cut, block, dtype, turned, seed):
    shape, boxes = cut
    name = "m.experts.weight"
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-30, 9, shape, generator=generator))
    whole = whole.masked_fill(torch.rand(shape, generator=generator) < 0.2, 0).to(getattr(torch, dtype))
    parts = []
    for offset, size in boxes:
        part = whole[tuple(slice(at, at + n) for at, n in zip(offset, size, strict=True))]
        parts.append(Part(name, shape, offset, part.mT.contiguous().mT if turned else part))
    source = QuantisedSource(PartSource(parts), Fp8(block))
    source.measure()
    wanted = dict(zip((name, name + ("_scale_inv" if block else "_scale")), plainly(whole, block), strict=True))
    layout = source.layout()
    found = {
        name: torch.zeros(layout.tensors.shapes[i], dtype=wanted[name].dtype)
        for name, i in layout.tensors.index.items()
    }
    times = {name: torch.zeros(made.shape, dtype=torch.int32) for name, made in found.items()}
    for i in range(len(layout)):
        shard = layout.shard(i)
        half = shard.shape[0] // 2  # as where a tensor lies in two buckets
        for start, rows in ((0, half), (half, shard.shape[0] - half)):
            size = (rows, *shard.shape[1:])
            out = torch.empty(size, dtype=wanted[shard.name].dtype)
            source.read_into(i, (start, *[0] * (out.dim() - 1)), size, out)
            first = (shard.offset[0] + start, *shard.offset[1:])
            at = tuple(slice(a, a + n) for a, n in zip(first, size, strict=True))
            found[shard.name][at] = out
            times[shard.name][at] += 1
    assert found.keys() == wanted.keys()
    for one, tensor in wanted.items():
        assert bool((times[one] == 1).all()), f"{one} is not sent just once"
        assert found[one].view(torch.uint8).equal(tensor.view(torch.uint8)), one


@given(boxed(), BLOCKS)
def test_whose_blocks_are_whole(cut, block):
    shape, boxes = cut
    grid = Grid.of(shape, block)
    assert grid.whole(boxes)
    for left_out in boxes:
        others = [box for box in boxes if box != left_out]
        mine, theirs = _blocks(grid, [left_out]), _blocks(grid, others)
        assert grid.whole(others) == grid.whole([left_out]) == (not mine & theirs)


def _blocks(grid: Grid, boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> set[tuple[int, ...]]:
    """The blocks in which boxes have any element, counted one by one."""
    found = set()
    for offset, shape in boxes:
        for at in torch.cartesian_prod(*[torch.arange(a, a + n) for a, n in zip(offset, shape, strict=True)]).tolist():
            found.add((*at[:-2], at[-2] // grid.height, at[-1] // grid.width))
    return found


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 12), st.integers(1, 30))
def test_strips_are_all_rows_once_and_keep_to_blocks(at, length, height, most):
    done = 0
    for strip in strips(at, length, height, most):
        assert strip.start == done
        first = at + done
        assert first // height == strip.block
        assert strip.rows <= max(most, 1)
        if strip.blocks > 1 or strip.rows == height:
            assert first % height == 0
            assert strip.rows == height
        else:
            assert first // height == (first + strip.rows - 1) // height
        assert strip.blocks * strip.rows <= max(most, height)
        done += strip.blocks * strip.rows
    assert done == length
