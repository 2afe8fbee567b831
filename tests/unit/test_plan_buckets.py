"""Buckets, who fills them, and what is refused: by example. By any example: tests/property/test_plan.py."""

from __future__ import annotations

import numpy as np
import pytest

from tests.plan_kit import filled, rank, read_back, rows, whole
from weightsync.errors import PushRefused
from weightsync.plan.buckets import Plan, plan_push
from weightsync.plan.coverage import _by_box
from weightsync.plan.manifest import Layout, Shard, TensorTable
from weightsync.plan.merge import merge_layouts


def names_by_bucket(plan: Plan) -> list[list[str]]:
    m = plan.manifest
    return [[m.tensors.names[m.piece_tensor[p]] for p in m.bucket_pieces(b)] for b in range(m.buckets)]


def plan_of(*layouts: Layout, slot_bytes: int = 1 << 20, owners: int = 1, alignment: int = 8) -> Plan:
    return plan_push(layouts, slot_bytes=slot_bytes, owners=owners, alignment=alignment)


def without_shards(table: TensorTable) -> Layout:
    nothing = np.empty((0, table.width), np.int64)
    return Layout(table, np.empty(0, np.int32), nothing, nothing)


class TestBuckets:
    def test_a_small_model_is_one_bucket(self):
        plan = plan_of(rank(whole("b", "int8", (5,)), whole("a", "float32", (3, 3)), whole("c", "int8", ())))
        m = plan.manifest
        assert names_by_bucket(plan) == [["a", "b", "c"]]
        assert m.piece_offset.tolist() == [0, 40, 48]
        assert m.bucket_nbytes.tolist() == [49]
        assert plan.fillers == ((0,),)

    def test_default_alignment_is_256(self):
        held = rank(whole("a", "int8", (5,)), whole("b", "int8", (300,)), whole("c", "int8", (1,)))
        m = plan_push([held], slot_bytes=1 << 20, owners=1).manifest
        assert m.piece_offset.tolist() == [0, 256, 768]
        assert m.alignment == 256

    def test_a_slot_may_be_smaller_than_the_alignment_and_is_used_to_its_last_byte(self):
        held = rank(whole("a", "int8", (100,)), whole("b", "int8", (100,)))
        assert names_by_bucket(plan_push([held], slot_bytes=100, owners=1)) == [["a"], ["b"]]
        assert names_by_bucket(plan_push([held], slot_bytes=356, owners=1)) == [["a", "b"]]
        assert names_by_bucket(plan_push([held], slot_bytes=355, owners=1)) == [["a"], ["b"]]

    def test_no_bytes_no_buckets(self):
        for layouts in ([rank()], [rank(whole("a", "int8", (0,)), whole("b", "int8", (3, 0, 2)))], [rank(), rank()]):
            plan = plan_push(layouts, slot_bytes=1, owners=2)
            assert (plan.manifest.buckets, plan.fillers) == (0, ())
            assert [fill.tolist() for fill in plan.fills] == [[]] * len(layouts)
            assert len(plan.manifest.tensors) == len(layouts[0].tensors)

    def test_owners_take_turns(self):
        held = rank(*(whole(f"t.{i}.w", "int8", (64,)) for i in range(7)))
        assert plan_of(held, slot_bytes=64, owners=3).manifest.bucket_owner.tolist() == [0, 1, 2, 0, 1, 2, 0]

    def test_a_large_tensor_is_cut_into_even_rows(self):
        plan = plan_of(rank(whole("a", "int8", (10, 8))), slot_bytes=39)  # 4 rows fit: 3 pieces of 4, 4, 2 or 4, 3, 3
        m = plan.manifest
        assert [m.piece_box(i) for i in range(3)] == [((0, 0), (4, 8)), ((4, 0), (4, 8)), ((8, 0), (2, 8))]
        m = plan_of(rank(whole("a", "int8", (9, 8))), slot_bytes=64).manifest  # 8 and 1 would be as few
        assert [m.piece_box(i)[1] for i in range(2)] == [(5, 8), (4, 8)]

    def test_where_a_row_does_not_fit_rows_are_cut(self):
        m = plan_of(rank(whole("a", "float16", (2, 3, 4))), slot_bytes=16).manifest
        assert m.pieces == 4
        assert [m.piece_box(i) for i in range(2)] == [((0, 0, 0), (1, 2, 4)), ((0, 2, 0), (1, 1, 4))]
        m = plan_of(rank(whole("a", "float16", (2, 3, 4))), slot_bytes=6).manifest
        assert [m.piece_box(i) for i in range(2)] == [((0, 0, 0), (1, 1, 2)), ((0, 0, 2), (1, 1, 2))]

    def test_a_piece_shares_its_bucket(self):
        held = rank(whole("a", "int8", (100,)), whole("b", "int8", (8,)))
        assert names_by_bucket(plan_of(held, slot_bytes=64)) == [["a"], ["a", "b"]]

    def test_an_element_that_does_not_fit_is_refused(self):
        with pytest.raises(PushRefused, match="does not hold one element of tensor 'a'") as caught:
            plan_of(rank(whole("a", "float32", (4,))), slot_bytes=3)
        assert caught.value.hint == "raise arena.slot_bytes"

    def test_absurdly_small_slots_are_refused(self):
        with pytest.raises(PushRefused, match="more than 4194304 pieces"):
            plan_of(rank(whole("a", "int8", (1 << 40,))), slot_bytes=64)

    @pytest.mark.parametrize("wrong", [{"slot_bytes": 0}, {"owners": 0}, {"alignment": 0}])
    def test_arguments_are_checked(self, wrong):
        with pytest.raises(ValueError, match="positive"):
            plan_of(rank(), **wrong)
        with pytest.raises(ValueError, match="at least one rank"):
            plan_push([], slot_bytes=1, owners=1)


class TestGroups:
    QKV = tuple(f"l.0.attn.{p}_proj.weight" for p in "qkv")

    def test_a_group_moves_to_the_next_bucket_whole(self):
        held = rank(whole("a", "int8", (40,)), *(whole(name, "int8", (24,)) for name in self.QKV))
        assert names_by_bucket(plan_of(held, slot_bytes=80)) == [["a"], [self.QKV[1], self.QKV[0], self.QKV[2]]]

    def test_a_group_larger_than_a_slot_is_refused_with_the_size_it_needs(self):
        held = rank(*(whole(name, "int8", (30,)) for name in self.QKV))
        with pytest.raises(PushRefused, match=r"k_proj.weight, .*q_proj.weight, .*v_proj.weight") as caught:
            plan_of(held, slot_bytes=60)
        assert caught.value.hint == "raise arena.slot_bytes to at least 94"
        assert names_by_bucket(plan_of(held, slot_bytes=94))
        with pytest.raises(PushRefused):
            plan_of(held, slot_bytes=93)

    def test_the_size_named_is_enough_for_every_group(self):
        """A slot large enough for one group can bring back together another that had to be cut."""
        gate_up = [whole(f"l.0.mlp.{p}_proj.weight", "int8", (n,)) for p, n in (("gate", 80), ("up", 40))]
        held = rank(*(whole(name, "int8", (30,)) for name in self.QKV), *gate_up)
        with pytest.raises(PushRefused) as caught:
            plan_of(held, slot_bytes=60)
        assert caught.value.hint == "raise arena.slot_bytes to at least 120"
        plan_of(held, slot_bytes=120)

    def test_a_group_with_a_tensor_larger_than_a_slot_is_cut(self):
        held = rank(*(whole(name, "int8", (n,)) for name, n in zip(self.QKV, (100, 8, 8), strict=True)))
        q, k, v = self.QKV
        assert names_by_bucket(plan_of(held, slot_bytes=64)) == [[k, q], [q, v]]


class TestLayers:
    def held(self, *sizes: tuple[int, ...]) -> Layout:
        return rank(*(whole(f"m.{i}.w{j}", "int8", (n,)) for i, layer in enumerate(sizes) for j, n in enumerate(layer)))

    def layers(self, plan: Plan) -> list[list[str]]:
        return [[name.removeprefix("m.") for name in bucket] for bucket in names_by_bucket(plan)]

    def test_a_bucket_three_quarters_full_ends_before_a_layer_that_does_not_fit(self):
        plan = plan_of(self.held((48, 32), (16, 16)), slot_bytes=104)  # 80 of 104 before layer 1
        assert self.layers(plan) == [["0.w0", "0.w1"], ["1.w0", "1.w1"]]

    def test_one_less_full_takes_what_fits(self):
        plan = plan_of(self.held((48, 16), (32, 16)), slot_bytes=104)  # 64 of 104
        assert self.layers(plan) == [["0.w0", "0.w1", "1.w0"], ["1.w1"]]

    def test_layers_that_fit_share(self):
        plan = plan_of(self.held((32,), (32,), (32,), (32,)), slot_bytes=96)
        assert self.layers(plan) == [["0.w0", "1.w0", "2.w0"], ["3.w0"]]

    def test_a_layer_larger_than_a_slot_is_cut_between_tensors(self):
        plan = plan_of(
            self.held(
                (64, 64, 64),
            ),
            slot_bytes=128,
        )
        assert self.layers(plan) == [["0.w0", "0.w1"], ["0.w2"]]


class TestFills:
    def test_each_rank_writes_its_own_rows(self):
        plan = plan_of(rank(rows("a", (5, 2), 0, 3)), rank(rows("a", (5, 2), 3, 5)), rank())
        assert [fill.tolist() for fill in plan.fills] == [[0], [0], []]
        assert plan.fillers == ((0, 1),)

    def test_replicas_are_written_once_and_shared_out_by_bytes(self):
        tensors = [whole(f"t{i}", "int8", (n,)) for i, n in enumerate((60, 10, 20, 30))]
        plan = plan_of(rank(*tensors), rank(*reversed(tensors)))
        # t0 to rank 0; t1, t2, t3 to rank 1, where they are shards 2, 1, 0.
        assert [fill.tolist() for fill in plan.fills] == [[0], [0, 1, 2]]

    def test_replicas_go_where_there_is_less_to_do(self):
        shared = whole("shared", "int8", (8,))
        plan = plan_of(rank(whole("own", "int8", (64,)), shared), rank(shared))
        assert [fill.tolist() for fill in plan.fills] == [[0], [0]]

    def test_hybrid_sharding_writes_every_box_once(self):
        layouts = [rank(*(rows(f"t{t}", (4, 2), half * 2, half * 2 + 2) for t in range(6))) for half in (0, 1, 0, 1)]
        plan = plan_of(*layouts)
        assert [len(fill) for fill in plan.fills] == [3, 3, 3, 3]

    def test_the_same_box_twice_on_one_rank_is_written_once(self):
        plan = plan_of(rank(whole("a", "int8", (3,)), whole("a", "int8", (3,))))
        assert [fill.tolist() for fill in plan.fills] == [[0]]

    def test_empty_shards_fill_nothing(self):
        plan = plan_of(rank(rows("a", (2, 2), 0, 2), rows("a", (2, 2), 2, 2)), rank(rows("a", (2, 2), 1, 1)))
        assert [fill.tolist() for fill in plan.fills] == [[0], []]

    def test_fillers_are_those_of_the_bytes_in_a_bucket(self):
        ranks = [rank(rows("a", (8, 4), 2 * i, 2 * i + 2, "int8"), whole("z", "int8", (2,))) for i in range(4)]
        plan = plan_of(*ranks, slot_bytes=12)
        # Pieces of 3, 3 and 2 rows; z follows in the last bucket and goes to the first of four equally loaded ranks.
        assert plan.fillers == ((0, 1), (1, 2), (0, 3))

    def test_boxes_are_told_apart_even_if_their_keys_are_not(self, monkeypatch):
        layouts = [rank(rows("a", (6, 2), i, i + 1), rows("a", (6, 2), i + 3, i + 4)) for i in range(3)]
        held = merge_layouts([*layouts, *layouts])
        monkeypatch.setattr("weightsync.plan.coverage.splitmix64", lambda x: x & np.uint64(0))
        order, first = _by_box(held)
        assert len(first) == 6
        assert [held.rank[order[at]] for at in first] == [held.rank[order[at + 1]] - 3 for at in first]

    def test_plans_are_repeatable(self):
        layouts = [rank(*(whole(f"t{i}", "int8", (i + 1,)) for i in range(20))) for _ in range(3)]
        one, other = plan_of(*layouts), plan_of(*(Layout.unpack(layout.pack()) for layout in layouts))
        assert one.manifest == other.manifest
        assert [a.tolist() for a in one.fills] == [b.tolist() for b in other.fills]

    def test_fills_are_read_only(self):
        with pytest.raises(ValueError, match="read-only"):
            plan_of(rank(whole("a", "int8", (1,)))).fills[0][:] = 1


class TestRefusals:
    def test_elements_that_nobody_holds(self):
        with pytest.raises(
            PushRefused, match=r"'a' of shape \(8, 2\): 4 elements, the first at \(3, 0\), are held by no"
        ) as e:
            plan_of(rank(rows("a", (8, 2), 0, 3)), rank(rows("a", (8, 2), 5, 8)))
        assert "rank 0 holds shape (3, 2) at offset (0, 0); rank 1 holds shape (3, 2) at offset (5, 0)" in str(e.value)

    def test_a_tensor_that_nobody_holds(self):
        table = TensorTable(("a",), ("int8",), ((2, 2),))
        none = without_shards(table)
        with pytest.raises(
            PushRefused, match=r"4 elements, the first at \(0, 0\), .* \(no rank holds any part of it\)"
        ):
            plan_of(none, none)
        scalar = without_shards(TensorTable(("s",), ("int8",), ((),)))
        with pytest.raises(PushRefused, match=r"1 elements, the first at \(\), are held by no rank"):
            plan_of(scalar)

    def test_boxes_that_overlap(self):
        with pytest.raises(PushRefused, match=r"'a'.*rank 0 holds .* and rank 2 holds .*, which overlap") as caught:
            plan_of(rank(rows("a", (8, 2), 0, 5)), rank(rows("a", (8, 2), 5, 8)), rank(rows("a", (8, 2), 4, 8)))
        assert caught.value.rank == 2

    def test_as_many_elements_as_there_should_be_is_not_enough(self):
        boxes = [Shard("a", "int8", (4, 4), offset, (2, 2)) for offset in ((0, 0), (0, 2), (2, 0), (1, 1))]
        with pytest.raises(PushRefused, match="overlap"):
            plan_of(*(rank(box) for box in boxes))

    def test_the_first_gap_of_many_boxes(self):
        missing = (2, 1, 3)
        cells = [(i, j, k) for i in range(3) for j in range(3) for k in range(4) if (i, j, k) != missing]
        with pytest.raises(PushRefused, match=r"1 elements, the first at \(2, 1, 3\).*; and 31 more"):
            plan_of(*(rank(Shard("a", "int8", (3, 3, 4), cell, (1, 1, 1))) for cell in cells))

    def test_too_many_boxes_are_not_explained_one_by_one(self):
        shards = [rows("a", (5001, 1), i, i + 1) for i in range(5000)]
        with pytest.raises(PushRefused, match="its 5000 shards overlap or leave elements out"):
            plan_of(rank(*shards))

    def test_the_first_wrong_tensor_in_order_is_named(self):
        with pytest.raises(PushRefused, match=r"'l\.2\.w'"):
            plan_of(rank(rows("l.10.w", (4,), 0, 2), rows("l.2.w", (4,), 0, 2), whole("l.1.w", "int8", (4,))))

    @pytest.mark.parametrize(
        ("other", "shown"),
        [
            (
                whole("l.9.w", "float16", (4, 2)),
                r"'l\.9\.w' is bfloat16 \(4, 2\) on rank 1 and float16 \(4, 2\) on rank 2",
            ),
            (
                whole("l.9.w", "bfloat16", (2, 4)),
                r"'l\.9\.w' is bfloat16 \(4, 2\) on rank 1 and bfloat16 \(2, 4\) on rank 2",
            ),
        ],
    )
    def test_ranks_that_disagree_about_a_tensor(self, other, shown):
        mine = [whole("l.10.w", "int8", (1,)), whole("l.9.w", "bfloat16", (4, 2))]
        with pytest.raises(PushRefused, match=shown) as caught:
            plan_of(rank(), rank(*mine), rank(whole("l.10.w", "int8", (2,)), other))
        assert caught.value.rank == 2


class TestAliases:
    def test_are_merged(self):
        a, b = whole("a", "int8", (1,)), whole("b", "int8", (1,))
        plan = plan_of(
            Layout.of([a], [("t10", "a"), ("t9", "a")]), Layout.of([b], [("u", "b")]), Layout.of([a], [("t9", "a")])
        )
        assert plan.manifest.tensors.aliases == (("t9", "a"), ("t10", "a"), ("u", "b"))

    def test_must_agree(self):
        a, b = whole("a", "int8", (1,)), whole("b", "int8", (1,))
        with pytest.raises(PushRefused, match="'t' is tied to 'a' on rank 0 and to 'b' on rank 1"):
            plan_of(Layout.of([a, b], [("t", "a")]), Layout.of([a, b], [("t", "b")]))
        with pytest.raises(PushRefused, match="'b' is tied to 'a' on rank 1 and a tensor of its own on rank 0"):
            plan_of(Layout.of([a, b]), Layout.of([a], [("b", "a")]))

    def test_a_rank_that_holds_nothing_of_it_need_not_know(self):
        """An empty local shard has no memory, so its rank cannot see that two names share it."""
        half = [rows(name, (2, 2), 0, 2) for name in ("a", "c")]
        empty = [rows(name, (2, 2), 2, 2) for name in ("a", "b", "c")]
        layouts = [Layout.of(empty), Layout.of(half, [("b", "a")])]
        plan = plan_of(*layouts)
        assert plan.manifest.tensors.names == ("a", "c")
        assert plan.manifest.tensors.aliases == (("b", "a"),)
        data = [np.arange(4, dtype=np.uint32).reshape(2, 2), np.arange(4, 8, dtype=np.uint32).reshape(2, 2)]
        back = read_back(plan.manifest, filled(plan, layouts, [[np.empty((0, 2), np.uint32)] * 3, data]))
        np.testing.assert_array_equal(back["c"], data[1])


def test_tables_of_different_widths_merge():
    """A pipeline stage with a convolution has wider rows than one without."""
    plan = plan_of(
        rank(whole("conv", "int8", (2, 2, 3, 3))), rank(whole("bias", "int8", (4,))), rank(whole("s", "int8", ()))
    )
    assert plan.manifest.tensors.names == ("bias", "conv", "s")
    assert [fill.tolist() for fill in plan.fills] == [[0], [0], [0]]


def test_more_tensors_than_a_reader_accepts_are_refused(monkeypatch):
    monkeypatch.setattr("weightsync.plan.merge.MAX_TENSORS", 2)
    with pytest.raises(PushRefused, match="3 tensors, more than 2"):
        plan_of(rank(whole("a", "int8", (1,)), whole("b", "int8", (1,))), rank(whole("c", "int8", (1,))))
    monkeypatch.setattr("weightsync.plan.merge.MAX_TOTAL_BYTES", 2)
    with pytest.raises(PushRefused, match="64 bits"):
        plan_of(rank(whole("a", "int8", (3,))))
