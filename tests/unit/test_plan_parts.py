"""Parts of shards, by example."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.plan_kit import rank, rows, whole
from weightsync.errors import RemoteProtocolError
from weightsync.plan.buckets import plan_push
from weightsync.plan.manifest import Shard
from weightsync.plan.parts import Part, parts_by_bucket


def test_a_whole_tensor_is_one_part():
    held = rank(whole("b", "int8", (2, 3)), whole("a", "int8", ()))
    plan = plan_push([held], slot_bytes=1024, owners=1)
    assert parts_by_bucket(plan.manifest, held, plan.fills[0]) == (
        (Part(1, 0, (), (), ()), Part(0, 1, (0, 0), (2, 3), (0, 0))),
    )


def test_a_shard_is_cut_where_pieces_end():
    """Rows 3 to 9 of 12, pieces of 5, 5 and 2 rows."""
    layouts = [rank(rows("a", (12, 2), *bounds, "int8")) for bounds in ((0, 3), (3, 9), (9, 12))]
    plan = plan_push(layouts, slot_bytes=8, owners=1, alignment=8)
    assert [plan.manifest.piece_box(i)[1] for i in range(3)] == [(4, 2)] * 3
    assert parts_by_bucket(plan.manifest, layouts[1], plan.fills[1]) == (
        (Part(0, 0, (0, 0), (1, 2), (3, 0)),),
        (Part(0, 1, (1, 0), (4, 2), (0, 0)),),
        (Part(0, 2, (5, 0), (1, 2), (0, 0)),),
    )


def test_columns_of_a_tensor_cut_into_rows():
    layouts = [rank(Shard("a", "int8", (4, 6), (0, o), (4, 3))) for o in (0, 3)]
    plan = plan_push(layouts, slot_bytes=12, owners=2, alignment=4)
    assert parts_by_bucket(plan.manifest, layouts[1], plan.fills[1]) == (
        (Part(0, 0, (0, 0), (2, 3), (0, 3)),),
        (Part(0, 1, (2, 0), (2, 3), (0, 3)),),
    )


def test_buckets_without_parts_are_empty():
    layouts = [rank(whole("a", "int8", (8,))), rank(whole("b", "int8", (8,))), rank()]
    plan = plan_push(layouts, slot_bytes=8, owners=1)
    assert [
        tuple(map(len, parts_by_bucket(plan.manifest, x, f))) for x, f in zip(layouts, plan.fills, strict=True)
    ] == [
        (1, 0),
        (0, 1),
        (0, 0),
    ]


def test_a_box_between_pieces_meets_only_those_it_touches():
    """Column 0 of a tensor cut inside its rows: every other piece lies between its elements."""
    layouts = [rank(Shard("a", "int8", (4, 8), (0, o), (4, n))) for o, n in ((0, 1), (1, 7))]
    plan = plan_push(layouts, slot_bytes=4, owners=1, alignment=4)
    met = parts_by_bucket(plan.manifest, layouts[0], plan.fills[0])
    assert [len(parts) for parts in met] == [1, 0] * 4
    assert plan.fillers == ((0, 1), (1,)) * 4


def test_a_plan_of_something_else_is_refused():
    held = rank(whole("a", "int8", (4,)))
    plan = plan_push([held], slot_bytes=64, owners=1)
    for other in (whole("b", "int8", (4,)), whole("a", "int8", (5,)), whole("a", "uint8", (4,))):
        with pytest.raises(RemoteProtocolError, match="does not have tensor"):
            parts_by_bucket(plan.manifest, rank(other), plan.fills[0])
    for fills in ([1], [-1]):
        with pytest.raises(RemoteProtocolError, match="does not have"):
            parts_by_bucket(plan.manifest, held, np.array(fills, np.int32))


def test_parts_are_plain_numbers():
    held = rank(rows("a", (4, 2), 0, 4))
    plan = plan_push([held], slot_bytes=64, owners=1)
    part = parts_by_bucket(plan.manifest, held, plan.fills[0])[0][0]
    assert all(type(x) is int for field in (part.src_offset, part.shape, part.dst_offset) for x in field)
    assert type(part.shard) is type(part.piece) is int
    assert not dataclasses.is_dataclass(part)
