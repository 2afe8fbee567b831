"""Whatever ranks hold and however they hold it, every byte of every tensor arrives once, in order, in its place."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plan_kit import filled, raw_dtype, read_back, window
from weightsync.errors import CodecError, PushRefused
from weightsync.plan.buckets import plan_push
from weightsync.plan.fused import group_key
from weightsync.plan.manifest import Layout, Manifest, Shard, TensorTable
from weightsync.plan.parts import parts_by_bucket

DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn", "int8", "int64")
NAMES = [
    "embed.weight",
    "norm.weight",
    *(f"layers.{i}.self_attn.{p}_proj.weight" for i in (0, 2, 10) for p in "qkvo"),
    *(f"layers.{i}.mlp.{p}_proj.weight" for i in (0, 2, 10) for p in ("gate", "up", "down")),
    *(f"layers.2.experts.{e}.{w}.weight" for e in (1, 11) for w in ("w1", "w2", "w3")),
]


class World:
    """Tensors and the ranks that hold them."""

    def __init__(self, tensors, shards, slot_bytes, alignment, seed):
        self.rng = np.random.default_rng(seed)
        self.tensors = {
            name: self.rng.integers(0, 256, size=(*shape, raw_dtype(dtype).itemsize), dtype=np.uint8)
            .reshape(-1)
            .view(raw_dtype(dtype))
            .reshape(shape)
            for name, (dtype, shape) in tensors.items()
        }
        self.layouts = [Layout.of(held) for held in shards]
        self.shards = [[self.tensors[s.name][window(s.offset, s.shape)] for s in held] for held in shards]
        self.slot_bytes, self.alignment = slot_bytes, alignment


@st.composite
def worlds(draw):
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=7))
    tensors = {}
    shards: list[list[Shard]] = [[] for _ in range(draw(st.integers(1, 4)))]
    for name in names:
        dtype = draw(st.sampled_from(DTYPES))
        shape = tuple(draw(st.lists(st.integers(0, 6) | st.just(5), max_size=4)))
        tensors[name] = (dtype, shape)
        boxes = [((0,) * len(shape), shape)]
        for _ in range(draw(st.integers(0, 4)) if shape else 0):
            offset, size = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
            dim = draw(st.integers(0, len(shape) - 1))
            cut = draw(st.integers(0, size[dim]))
            boxes.append((offset, (*size[:dim], cut, *size[dim + 1 :])))
            behind = (*offset[:dim], offset[dim] + cut, *offset[dim + 1 :])
            boxes.append((behind, (*size[:dim], size[dim] - cut, *size[dim + 1 :])))
        for offset, size in boxes:
            for holder in draw(st.sets(st.integers(0, len(shards) - 1), min_size=1)):
                shards[holder].append(Shard(name, dtype, shape, offset, size))
    shards = [draw(st.permutations(held)) for held in shards]
    return World(
        tensors, shards, draw(st.integers(8, 400)), draw(st.sampled_from((8, 16, 64))), draw(st.integers(0, 99))
    )


def planned(world: World):
    """The plan, or None where it is rightly refused because a fused group does not fit."""
    refused = None
    try:
        return plan_push(world.layouts, slot_bytes=world.slot_bytes, owners=3, alignment=world.alignment)
    except PushRefused as error:
        refused = error
    assert "fuse" in refused.message
    groups = defaultdict(list)
    for name, data in world.tensors.items():
        groups[group_key(name)].append(data.nbytes)
    assert any(
        max(sizes) <= world.slot_bytes < sum(math.ceil(n / world.alignment) * world.alignment for n in sizes)
        for sizes in groups.values()
    )
    assert refused.hint is not None
    need = int(refused.hint.rsplit(" ", 1)[1])
    assert plan_push(world.layouts, slot_bytes=need, owners=3, alignment=world.alignment)
    return None


@settings(deadline=None, max_examples=200)
@given(worlds())
def test_every_tensor_arrives(world):
    if (plan := planned(world)) is None:
        return
    back = read_back(plan.manifest, filled(plan, world.layouts, world.shards))
    assert back.keys() == world.tensors.keys()
    for name, data in world.tensors.items():
        np.testing.assert_array_equal(back[name], data, err_msg=name)


@settings(deadline=None, max_examples=150)
@given(worlds())
def test_buckets_keep_the_rules(world):
    if (plan := planned(world)) is None:
        return
    m = plan.manifest
    assert Manifest.unpack(m.pack()) == m
    assert m.nbytes == sum(data.nbytes for data in world.tensors.values())
    assert (m.piece_offset % world.alignment == 0).all()
    assert (m.bucket_nbytes <= world.slot_bytes).all()
    assert m.bucket_owner.tolist() == [i % 3 for i in range(m.buckets)]
    buckets_of = defaultdict(set)
    for bucket in range(m.buckets):
        end = 0
        for piece in m.bucket_pieces(bucket):
            assert int(m.piece_offset[piece]) >= end
            end = int(m.piece_offset[piece] + m.piece_nbytes[piece])
            buckets_of[group_key(m.tensors.names[m.piece_tensor[piece]])].add(bucket)
        assert end == m.bucket_nbytes[bucket]
    split = {key for key, buckets in buckets_of.items() if len(buckets) > 1}
    large = {group_key(name) for name, data in world.tensors.items() if data.nbytes > world.slot_bytes}
    assert split <= large


@settings(deadline=None, max_examples=150)
@given(worlds())
def test_each_byte_is_written_once(world):
    if (plan := planned(world)) is None:
        return
    m = plan.manifest
    written = [np.zeros(n, np.uint8) for n in m.bucket_nbytes.tolist()]
    fillers: list[set[int]] = [set() for _ in range(m.buckets)]
    for rank, (layout, fills) in enumerate(zip(world.layouts, plan.fills, strict=True)):
        assert fills.tolist() == sorted(set(fills.tolist()))
        for bucket, parts in enumerate(parts_by_bucket(m, layout, fills)):
            for part in parts:
                fillers[bucket].add(rank)
                begin = int(m.piece_offset[part.piece])
                itemsize = int(m.tensors.itemsizes[m.piece_tensor[part.piece]])
                data = written[bucket][begin : begin + int(m.piece_nbytes[part.piece])]
                data.reshape((*m.piece_box(part.piece)[1], itemsize))[window(part.dst_offset, part.shape)] += 1
    assert [tuple(sorted(ranks)) for ranks in fillers] == list(plan.fillers)
    for bucket in range(m.buckets):
        wanted = np.zeros_like(written[bucket])
        for piece in m.bucket_pieces(bucket):
            wanted[int(m.piece_offset[piece]) :][: int(m.piece_nbytes[piece])] = 1
        np.testing.assert_array_equal(written[bucket], wanted)


@settings(deadline=None, max_examples=100)
@given(worlds(), st.randoms(use_true_random=False))
def test_manifest_does_not_depend_on_anyones_order(world, random):
    if (plan := planned(world)) is None:
        return
    shuffled = []
    for layout in world.layouts:
        shards = [layout.shard(i) for i in range(len(layout))]
        random.shuffle(shards)
        shuffled.append(Layout.of(shards))
    random.shuffle(shuffled)
    again = plan_push(shuffled, slot_bytes=world.slot_bytes, owners=3, alignment=world.alignment)
    assert again.manifest.digest == plan.manifest.digest


@settings(deadline=None, max_examples=100)
@given(worlds(), st.data())
def test_losing_a_box_is_refused(world, data):
    shards = [[layout.shard(i) for i in range(len(layout))] for layout in world.layouts]
    some = sorted({s for held in shards for s in held if s.shape and math.prod(s.shape)}, key=repr)
    if not some:
        return
    lost = data.draw(st.sampled_from(some))
    nothing = (0,) * len(lost.shape)
    empty = Shard(lost.name, lost.dtype, lost.global_shape, nothing, nothing)
    broken = [Layout.of([empty if shard == lost else shard for shard in held]) for held in shards]
    with pytest.raises(PushRefused, match="held by no rank") as caught:
        plan_push(broken, slot_bytes=1 << 20, owners=1)
    assert f"{lost.name!r}" in caught.value.message
    assert f"{math.prod(lost.shape)} elements, the first at {lost.offset}" in caught.value.message


@settings(deadline=None, max_examples=100)
@given(worlds(), st.data())
def test_boxes_that_overlap_are_refused(world, data):
    """One more box that shares elements with others but is none of them."""
    shards = [[layout.shard(i) for i in range(len(layout))] for layout in world.layouts]
    some = sorted({s for held in shards for s in held if s.shape and math.prod(s.shape) > 1}, key=repr)
    if not some:
        return
    box = data.draw(st.sampled_from(some))
    dim = data.draw(st.sampled_from([d for d, length in enumerate(box.shape) if length > 1]))
    shape = (*box.shape[:dim], data.draw(st.integers(1, box.shape[dim] - 1)), *box.shape[dim + 1 :])
    shards.append([Shard(box.name, box.dtype, box.global_shape, box.offset, shape)])
    with pytest.raises(PushRefused, match="which overlap") as caught:
        plan_push([Layout.of(held) for held in shards], slot_bytes=1 << 20, owners=1)
    assert f"{box.name!r}" in caught.value.message
    assert f"rank {len(shards) - 1}" in caught.value.message


@settings(deadline=None, max_examples=100)
@given(worlds(), st.data())
def test_packed_bytes_come_back_and_damage_is_noticed(world, data):
    plan = planned(world)
    things: list[tuple[type[Layout | TensorTable | Manifest], bytes]] = [
        (Layout, layout.pack()) for layout in world.layouts
    ]
    things += [(TensorTable, world.layouts[0].tensors.pack())]
    if plan is not None:
        things.append((Manifest, plan.manifest.pack()))
    for kind, packed in things:
        again = kind.unpack(packed)
        assert again.pack() == packed
        damaged = bytearray(packed)
        for _ in range(data.draw(st.integers(1, 3))):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
        cut = damaged[: data.draw(st.integers(0, len(damaged)))]
        for hostile in (bytes(damaged), bytes(cut), packed + b"\0"):
            try:
                survived = kind.unpack(hostile)
            except CodecError:
                continue
            assert (survived.digest == again.digest) == (hostile == packed)


@given(worlds(), st.data())
def test_nodes_that_give_one_another_their_runs_each_have_every_bucket_whole(world, data):
    ranks = len(world.layouts)
    nodes = data.draw(st.lists(st.integers(0, 2), min_size=ranks, max_size=ranks))
    terms = {"slot_bytes": world.slot_bytes, "owners": 3, "alignment": world.alignment}
    if planned(world) is None:
        return
    plan = plan_push(world.layouts, **terms, nodes=nodes)
    whose = {nodes[rank] for fillers in plan.fillers for rank in fillers}
    if whose <= {0}:
        assert plan.shares == ()
        return
    none = np.array([], dtype=np.int32)
    parts = {
        node: filled(
            replace(plan, fills=tuple(f if n == node else none for f, n in zip(plan.fills, nodes, strict=True))),
            world.layouts,
            world.shards,
        )
        for node in whose
    }
    received = [np.full(n, 0xEE, np.uint8) for n in plan.manifest.bucket_nbytes.tolist()]
    for index, shares in enumerate(plan.shares):
        assert [share.node for share in shares] == sorted({nodes[rank] for rank in plan.fillers[index]})
        taken = np.zeros(len(received[index]), dtype=int)
        for share in shares:
            for begin, count in np.frombuffer(share.runs, "<i8").reshape(-1, 2).tolist():
                received[index][begin : begin + count] = parts[share.node][index][begin : begin + count]
                taken[begin : begin + count] += 1
        assert taken.max() <= 1, "no byte is sent twice"
    for name, tensor in read_back(plan.manifest, received).items():
        assert np.array_equal(tensor, world.tensors[name])
