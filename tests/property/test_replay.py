"""Whatever views and copies a loader goes through: what is replayed is what it loaded."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import box_emulation
from tests.replay_kit import Model, read_buckets, same
from weightsync.fingerprint import fingerprint
from weightsync.replay.kernel import KernelMoves
from weightsync.replay.model import ModelState
from weightsync.replay.moves import apply, raw_bytes, strided_view
from weightsync.replay.state import ModelReplay
from weightsync.replay.strided import Box, compose, merge_dims
from weightsync.replay.sums import HostSums, KernelSums

DTYPES = (torch.float32, torch.bfloat16)


@st.composite
def views(draw: Any, example: torch.Tensor, copies: bool) -> list[Any]:
    """Steps from a tensor like this one to another, as functions of it. With `copies`, some move memory on the way."""
    steps: list[Any] = []
    kinds = ["narrow", "transpose", "chunk", "unsqueeze", "select", "step", "unflatten", "flatten"]
    for _ in range(draw(st.integers(0, 5))):
        kind = draw(st.sampled_from([*kinds, "clone", "reshape", "convert"] if copies else kinds))
        dim = draw(st.integers(0, max(0, example.dim() - 1)))
        step: Any = None
        if not example.dim() and kind not in ("unsqueeze", "clone", "convert"):
            continue
        size = example.shape[dim] if example.dim() else 1
        if kind == "narrow":
            first = draw(st.integers(0, size - 1))
            count = draw(st.integers(1, size - first))
            step = partial(torch.Tensor.narrow, dim=dim, start=first, length=count)
        elif kind == "transpose":
            other = draw(st.integers(0, example.dim() - 1))
            step = partial(torch.Tensor.transpose, dim0=dim, dim1=other)
        elif kind == "chunk":
            at = draw(st.integers(0, 1))
            step = partial(_chunk, dim=dim, at=at)
        elif kind == "unsqueeze":
            step = partial(torch.Tensor.unsqueeze, dim=dim)
        elif kind == "select":
            at = draw(st.integers(0, size - 1))
            step = partial(torch.Tensor.select, dim=dim, index=at)
        elif kind == "step":
            by = draw(st.integers(1, 3))
            step = partial(_every, dim=dim, by=by)
        elif kind == "unflatten" and size % 2 == 0:
            step = partial(torch.Tensor.unflatten, dim=dim, sizes=(2, -1))
        elif kind == "flatten" and example.is_contiguous():
            step = _flat
        elif kind == "clone":
            form = draw(st.sampled_from([torch.preserve_format, torch.contiguous_format]))
            step = partial(torch.Tensor.clone, memory_format=form)
        elif kind == "reshape":
            step = partial(torch.Tensor.reshape, shape=(-1,))
        elif kind == "convert":
            to = draw(st.sampled_from(DTYPES))
            step = partial(torch.Tensor.to, dtype=to)
        if step is not None:
            steps.append(step)
            example = step(example)
    return steps


@st.composite
def loads(draw: Any, copies: bool) -> tuple[dict[str, tuple[Any, torch.dtype]], dict[str, torch.Tensor], Any]:
    """Tensors to push, the parameters that they are loaded into, and the loader."""
    shapes = {f"t{i}": tuple(draw(st.lists(st.integers(1, 6), max_size=3))) for i in range(draw(st.integers(1, 4)))}
    dtypes = {name: draw(st.sampled_from(DTYPES)) for name in shapes}
    parts: list[list[tuple[str, list[Any]]]] = []
    parameters: dict[str, torch.Tensor] = {}
    for i in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(shapes)))
        steps = draw(views(torch.zeros(shapes[name], dtype=dtypes[name]), copies))
        part = _through(torch.zeros(shapes[name], dtype=dtypes[name]), steps)
        same_shape = [(name, steps)] + ([(name, steps)] if draw(st.booleans()) else [])
        parts.append(same_shape)
        dim = draw(st.integers(0, part.dim()))
        shape = (*part.shape[:dim], len(same_shape), *part.shape[dim:])
        made = torch.zeros(shape, dtype=draw(st.sampled_from(DTYPES)))
        if draw(st.booleans()):
            made = made.transpose(0, -1).contiguous().transpose(0, -1)
        parameters[f"layer{i}.w{dim}"] = made

    def load(targets: Any, tensors: Any) -> None:
        for name, tensor in tensors:
            for (target, parameter), some in zip(sorted(targets.items()), parts, strict=True):
                dim = int(target[-1])
                for at, (source, steps) in enumerate(some):
                    if source == name:
                        parameter.select(dim, at).copy_(_through(tensor, steps))

    return {name: (shapes[name], dtypes[name]) for name in shapes}, parameters, load


def _chunk(tensor: torch.Tensor, dim: int, at: int) -> torch.Tensor:
    chunks = tensor.chunk(2, dim)
    return chunks[min(at, len(chunks) - 1)]


def _every(tensor: torch.Tensor, dim: int, by: int) -> torch.Tensor:
    return tensor[(slice(None),) * dim + (slice(None, None, by),)]


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1)


def _through(tensor: torch.Tensor, steps: list[Any]) -> torch.Tensor:
    for step in steps:
        tensor = step(tensor)
    return tensor


def _weights(table: Any, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, (shape, dtype) in table.items()}


def _three_pushes(found: Any, slot_bytes: int) -> tuple[ModelReplay, Model]:
    table, parameters, load = found
    model, replay = Model(parameters, load), ModelReplay({})
    for seed in range(3):
        model.push(replay, _weights(table, seed), slot_bytes)
        got = {name: tensor.clone() for name, tensor in ModelState.of(model).tensors.items()}
        heard = list(model.heard)
        for name, tensor in model.loaded(_weights(table, seed)).items():
            assert same(tensor, got[name])
        model.heard = heard
    return replay, model


@settings(max_examples=150, deadline=None)
@given(loads(copies=False), st.sampled_from([256, 1 << 16]))
def test_views_are_always_replayed_and_give_what_the_loader_gives(found, slot_bytes):
    replay, _ = _three_pushes(found, slot_bytes)
    facts = replay.facts()
    assert set(facts.why) <= {"the loader was not seen to copy any of it"}
    assert facts.phase == "replay"


@settings(max_examples=150, deadline=None)
@given(loads(copies=True), st.sampled_from([256, 1 << 16]))
def test_with_copies_on_the_way_nothing_else_than_the_loader_gives_comes_out(found, slot_bytes):
    replay, _ = _three_pushes(found, slot_bytes)
    assert not any("differs" in why for why in replay.facts().why), "the plan was wrong, and only its proof saw it"


@settings(max_examples=50, deadline=None)
@given(loads(copies=True), st.sampled_from([256, 1 << 16]))
def test_what_lies_in_parameters_is_told_as_boxes_of_what_was_pushed(found, slot_bytes):
    replay, model = _three_pushes(found, slot_bytes)
    sent = _weights(found[0], 2)
    manifest, _ = read_buckets(sent, slot_bytes)
    state = ModelState.of(model)
    held = replay.residents(manifest.digest, state)
    assert (held is not None) == (replay.facts().phase == "replay")
    if held is None:
        return
    for one, told in zip(
        held.held, np.frombuffer(HostSums(held).fingerprints(state.tensors), "<u8").tolist(), strict=True
    ):
        tensor = sent[manifest.tensors.names[one.tensor]]
        box = tensor[tuple(slice(o, o + s) for o, s in zip(one.offset, one.shape, strict=True))]
        where = {"global_shape": tuple(tensor.shape), "offset": one.offset, "shape": one.shape}
        assert told == fingerprint(raw_bytes(box).numpy(), itemsize=tensor.element_size(), **where)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_view_of_a_copy_is_a_view_of_what_was_copied(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    order = data.draw(st.permutations(range(len(shape))))
    there = torch.arange(300)
    strides = data.draw(st.permutations([1, 6, 36][: len(shape)]))
    source = there.as_strided(shape, strides, 3)
    copy = source.permute(order).contiguous().permute([order.index(i) for i in range(len(order))])
    view = _through(copy, data.draw(views(copy, copies=False)))
    found = compose(_box(view), _box(copy), _box(source))
    if found is None:
        assert not source.is_contiguous() or not copy.is_contiguous(), "what lies in one run is always followed"
        return
    offset, dims = found
    flat = [part for parts in dims for part in parts]
    again = there.as_strided([p.size for p in flat], [p.source // 8 for p in flat], offset // 8)
    assert again.reshape(view.shape).equal(view)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 8), st.integers(0, 8)), max_size=4))
def test_joined_dimensions_are_the_same_elements(dims):
    sizes, one, other = (tuple(column) for column in zip(*dims, strict=True)) if dims else ((), (), ())
    joined = merge_dims(Box(0, sizes, one), Box(0, sizes, other))
    for before, after in zip((one, other), joined, strict=True):
        memory = torch.arange(200)
        wanted = memory.as_strided(sizes, before).reshape(-1)
        assert memory.as_strided(after.sizes, after.strides).reshape(-1).equal(wanted)


def _box(tensor: torch.Tensor) -> Box:
    return Box(8 * int(tensor.storage_offset()), tuple(tensor.shape), tuple(8 * s for s in tensor.stride()))


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    if box_emulation.COMPILER is None:
        pytest.skip("no C++ compiler to run the kernel with")
    return box_emulation.library(tmp_path_factory.mktemp("boxes"))


@settings(max_examples=60, deadline=None)
@given(found=loads(copies=False))
def test_a_launch_over_a_table_does_what_the_loop_does(kernel, found):
    """What takes the place of the loop on GPUs, run by this machine's processor."""

    table, parameters, load = found
    model, replay = Model(parameters, load), ModelReplay({})
    model.push(replay, _weights(table, 0))
    known = replay._known
    assert known is not None
    manifest, buckets = read_buckets(_weights(table, 1), 1 << 20)
    targets = ModelState.of(model).tensors
    order = {i: targets[name] for i, name in enumerate(known.moves.targets)}
    (bucket,) = buckets
    moves = known.moves.buckets[0].moves
    apply(moves, bucket.data, order)
    wanted = {i: target.clone() for i, target in order.items()}
    mover = KernelMoves(box_emulation.EmulatedKernel(kernel), torch.device("cpu"))
    elsewhere = {i: target.clone() for i, target in order.items()}
    for onto in (order, order, elsewhere):  # all but the first time from the table that is there
        for move in moves:
            strided_view(onto[move.target], move.target_box).zero_()
        mover.onto(onto)("bucket", moves, bucket.data, 1)
        assert all(same(onto[i], wanted[i]) for i in onto)
    assert manifest.buckets == 1
    residents = known.held(manifest)
    sums = KernelSums(box_emulation.EmulatedKernel(kernel), torch.device("cpu"), residents).fingerprints(targets)
    assert sums == HostSums(residents).fingerprints(targets)


def addresses(box):
    """Of each of its elements, in row-major order."""
    return [
        box.offset + sum(at * stride for at, stride in zip(index, box.strides, strict=True))
        for index in itertools.product(*map(range, box.sizes))
    ]


@pytest.mark.parametrize(("sizes", "views_followed"), [((12,), 1938), ((3, 4), 868), ((2, 6), 1046), ((2, 2, 3), 692)])
def test_a_view_of_any_kind_is_composed_rightly_or_not_at_all(sizes, views_followed):
    """Also one whose windows overlap, or that begins in the middle; `sizes` are of what was copied, without gaps."""
    own = Box(0, sizes, tuple(math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))))
    source = Box(1000, sizes, tuple(range(100, 100 + 17 * len(sizes), 17)))  # neither joined nor in order there
    comes_from = dict(zip(addresses(own), addresses(source), strict=True))
    lengths, strides = (1, 2, 3, 4, 6, 8, 12), (1, 2, 3, 4, 6)
    followed = 0
    for offset, *dims in itertools.product(range(12), *[lengths, strides] * 2):
        view = Box(offset, (dims[0], dims[2]), (dims[1], dims[3]))
        composed = compose(view, own, source)
        if composed is None:
            continue
        followed += 1
        parts = [part for several in composed[1] for part in several]
        found = Box(composed[0], tuple(part.size for part in parts), tuple(part.source for part in parts))
        assert addresses(found) == [comes_from.get(at) for at in addresses(view)], view
    assert followed == views_followed, "one more or less is no fault: see which, and whether it should be"
