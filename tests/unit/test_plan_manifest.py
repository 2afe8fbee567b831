"""Tables, layouts and manifests: what they hold, what they refuse, how their bytes come back."""

from __future__ import annotations

import dataclasses
import struct

import msgspec
import numpy as np
import pytest

from tests.plan_kit import rank, rows, whole
from weightsync.errors import CodecError, SourceError
from weightsync.plan.buckets import plan_push
from weightsync.plan.manifest import MAX_NDIM, Layout, Manifest, Shard, TensorTable

TABLE = TensorTable(
    names=("a", "b.weight", "ü"),
    dtypes=("bfloat16", "float32", "int8"),
    shapes=((4, 6), (), (0, 3, 1)),
    aliases=(("tied", "a"),),
)


def layout():
    return Layout.of(
        [rows("a", (4, 6), 0, 2, "bfloat16"), rows("a", (4, 6), 2, 4, "bfloat16"), whole("s", "int8", ())],
        [("tied", "a")],
    )


def manifest() -> Manifest:
    held = rank(whole("a", "float32", (100, 4)), whole("b", "int8", (7,)), whole("c", "int8", (0,)))
    return plan_push([held], slot_bytes=512, owners=2, alignment=8).manifest


def repacked(packed: bytes, **changes: object) -> bytes:
    """The same bytes with some columns replaced."""
    return msgspec.msgpack.encode(msgspec.msgpack.decode(packed) | changes)


def ints(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


class TestTable:
    def test_comes_back(self):
        again = TensorTable.unpack(TABLE.pack())
        assert again == TABLE
        assert dataclasses.astuple(again) == dataclasses.astuple(TABLE)
        assert len(again.digest) == 16
        assert TensorTable.unpack(TensorTable((), (), ()).pack()).names == ()

    def test_counts(self):
        assert [TABLE.numel(i) for i in range(3)] == [24, 1, 0]
        assert [TABLE.nbytes(i) for i in range(3)] == [48, 4, 0]
        assert TABLE.index == {"a": 0, "b.weight": 1, "ü": 2}
        assert TABLE.dims.tolist() == [[4, 6, 1], [1, 1, 1], [0, 3, 1]]

    @pytest.mark.parametrize(
        "other",
        [
            dataclasses.replace(TABLE, names=("a", "b", "ü")),
            dataclasses.replace(TABLE, dtypes=("float16", "float32", "int8")),
            dataclasses.replace(TABLE, shapes=((6, 4), (), (0, 3, 1))),
            dataclasses.replace(TABLE, shapes=((4, 6), (1,), (0, 3))),
            dataclasses.replace(TABLE, aliases=()),
            dataclasses.replace(TABLE, aliases=(("tied", "b.weight"),)),
        ],
    )
    def test_digest_covers_everything(self, other):
        assert other.digest != TABLE.digest
        assert other != TABLE

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"names": b"a\0b"}, "lengths"),
            ({"names": b"a\0a\0c"}, "'a' occurs twice"),
            ({"names": b"a\0tied\0c"}, "'tied' occurs twice"),
            ({"names": b"a\0\0c"}, "empty tensor name"),
            ({"names": b"a\0" + b"b" * 513 + b"\0c"}, "512 bytes"),
            ({"names": b"a\0\xff\0c"}, "utf-8"),
            ({"names": "a\0b\0c"}, "not a packed table"),
            ({"dtypes": bytes([3, 1])}, "lengths"),
            ({"dtypes": bytes([3, 1, 99])}, "unknown dtype"),
            ({"ndims": bytes([2, 0, MAX_NDIM + 1])}, "dimensions"),
            ({"ndims": bytes([2, 1, 3])}, "dimensions"),
            ({"dims": ints(4, 6, 0, 3)}, "dimensions"),
            ({"dims": ints(4, 6, 0, 3, 1)[:-1]}, "multiple of 8"),
            ({"dims": ints(4, -6, 0, 3, 1)}, "'a' has a negative"),
            ({"dims": ints(1 << 31, 1 << 31, 0, 3, 1)}, "'a' is too large"),
            ({"dims": ints(4, 6, 0, 1 << 62, 1)}, "'ü' is too large"),
            ({"alias_of": struct.pack("<i", 3)}, "alias"),
            ({"alias_of": struct.pack("<i", -1)}, "alias"),
            ({"alias_of": b""}, "lengths"),
            ({"format": 2}, "format 2"),
            ({"format": None}, "not a packed table"),
            ({"surplus": 1}, "not a packed table"),
        ],
    )
    def test_refuses_hostile_bytes(self, changes, why):
        with pytest.raises(CodecError, match=why):
            TensorTable.unpack(repacked(TABLE.pack(), **changes))

    @pytest.mark.parametrize("data", [b"", b"\xc1", b"\x90", b"\x80", TABLE.pack()[:-1], TABLE.pack() + b"x"])
    def test_refuses_bytes_that_are_no_table(self, data):
        with pytest.raises(CodecError):
            TensorTable.unpack(data)

    def test_refuses_products_beyond_any_float(self):
        shapes = ((2**40,) * MAX_NDIM,) * 3
        with pytest.raises(CodecError, match="too large"):
            TensorTable.unpack(dataclasses.replace(TABLE, shapes=shapes).pack())


class TestLayout:
    def test_comes_back(self):
        again = Layout.unpack(layout().pack())
        assert again == layout()
        assert [again.shard(i) for i in range(3)] == [layout().shard(i) for i in range(3)]
        assert again.shard(1) == Shard("a", "bfloat16", (4, 6), (2, 0), (2, 6))
        assert again.tensors.aliases == (("tied", "a"),)
        assert again.nbytes == 49

    def test_is_read_only(self):
        for array in (layout().tensor, layout().offset, layout().shape, layout().tensors.dims):
            with pytest.raises(ValueError, match="read-only"):
                array[:] = 0

    def test_a_table_seen_before_is_used_again(self):
        tables: dict[bytes, TensorTable] = {}
        one = Layout.unpack(rank(rows("a", (4, 2), 0, 2)).pack(), tables)
        other = Layout.unpack(rank(rows("a", (4, 2), 2, 4)).pack(), tables)
        assert one.tensors is other.tensors
        assert tables == {one.tensors.digest: one.tensors}
        assert one != other

    def test_digest_covers_offsets_and_shapes(self):
        digests = {rank(rows("a", (9, 2), *bounds)).digest for bounds in ((0, 2), (1, 3), (0, 3))}
        assert len(digests) == 3

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"tensors": b"\x80"}, "not a packed table"),
            ({"width": 1}, "1 dimensions wide"),
            ({"width": MAX_NDIM + 1}, "wide"),
            ({"width": -1}, "wide"),
            ({"tensor": struct.pack("<3i", 0, 0, 2)}, "not there"),
            ({"tensor": struct.pack("<3i", 0, -1, 1)}, "not there"),
            ({"tensor": struct.pack("<2i", 0, 0)}, "lengths"),
            ({"offset": ints(0, 0, 2, 0)}, "lengths"),
            ({"offset": ints(0, 0, 3, 0, 0, 0)}, "'a' of shape .4, 6. has a shard outside it: offset .3, 0."),
            ({"offset": ints(0, 0, -1, 0, 0, 0)}, "outside"),
            ({"offset": ints(0, 0, 2, 0, 1, 0)}, "outside"),  # in a dimension that the tensor does not have
            ({"shape": ints(2, 6, 2, 6, 1, 2)}, "outside"),
            ({"shape": ints(2, 6, (1 << 63) - 1, 6, 1, 1)}, "outside"),
            ({"shape": ints(2, 6, -1, 6, 1, 1)}, "outside"),
        ],
    )
    def test_refuses_hostile_bytes(self, changes, why):
        with pytest.raises(CodecError, match=why):
            Layout.unpack(repacked(layout().pack(), **changes))

    @pytest.mark.parametrize(
        ("shards", "aliases", "why"),
        [
            ([whole("a", "float4", (1,))], [], "dtype float4"),
            ([whole("a", "int8", (1,)), whole("a", "int8", (2,))], [], "'a' is given as int8 .1,. and as int8 .2,."),
            ([Shard("a", "int8", (4,), (3,), (2,))], [], "outside"),
            ([Shard("a", "int8", (4,), (0, 0), (2,))], [], "dimensions"),
            ([whole("", "int8", (4,))], [], "cannot be sent"),
            ([whole("x\0y", "int8", (4,))], [], "cannot be sent"),
            ([whole("n" * 513, "int8", (4,))], [], "cannot be sent"),
            ([whole("\udc80", "int8", (4,))], [], "utf-8"),
            ([whole("a", "int8", (1,) * 17)], [], "17 dimensions"),
            ([whole("a", "int8", (-1,))], [], "negative"),
            ([whole("a", "int8", (4,))], [("b", "c")], "'c', which is not there"),
            ([whole("a", "int8", (4,))], [("a", "a")], "'a' occurs twice"),
        ],
    )
    def test_this_sides_own_mistakes_are_source_errors(self, shards, aliases, why):
        with pytest.raises(SourceError, match=why):
            Layout.of(shards, aliases)


class TestManifest:
    def test_comes_back(self):
        again = Manifest.unpack(manifest().pack())
        assert again == manifest()
        assert again.digest == manifest().digest
        assert again.nbytes == 1607
        assert [again.piece_box(i) for i in range(again.pieces)] == [
            *(((i * 25, 0), (25, 4)) for i in range(4)),
            ((0,), (7,)),
        ]
        assert list(again.bucket_pieces(3)) == [3, 4]

    def test_without_any_bytes(self):
        empty = plan_push([rank(whole("a", "int8", (0, 3)))], slot_bytes=64, owners=1).manifest
        again = Manifest.unpack(empty.pack())
        assert (again.buckets, again.pieces, again.nbytes) == (0, 0, 0)
        assert again.tensors.names == ("a",)

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"tensors": b""}, "not a packed table"),
            ({"alignment": 0}, "alignment"),
            ({"alignment": 1 << 21}, "alignment"),
            ({"alignment": 1 << 63}, "alignment"),
            ({"alignment": 512}, "multiple of 512"),
            ({"piece_tensor": struct.pack("<5i", 0, 0, 0, 0, 3)}, "not there"),
            ({"piece_tensor": struct.pack("<5i", -1, 0, 0, 0, 1)}, "not there"),
            ({"piece_tensor": struct.pack("<5i", 1, 0, 0, 0, 0)}, "outside|in order"),
            ({"piece_tensor": struct.pack("<4i", 0, 0, 0, 0)}, "lengths"),
            ({"piece_start": ints(0, 100, 200, 200, 0)}, "once and in order"),
            ({"piece_start": ints(0, 100, 200, -100, 0)}, "outside"),
            ({"piece_count": ints(100, 100, 100, 50, 7)}, "once and in order"),
            ({"piece_count": ints(100, 100, 100, 100, 8)}, "outside"),
            ({"piece_count": ints(100, 100, 100, 0, 7)}, "outside"),
            ({"piece_count": ints(100, 100, 100, (1 << 63) - 1, 7)}, "outside"),
            ({"piece_start": ints(0, 90, 200, 300, 0), "piece_count": ints(90, 110, 100, 100, 7)}, "not a box"),
            ({"piece_offset": ints(0, 0, 0, 0, 256)}, "overlap"),
            ({"piece_offset": ints(0, 0, 0, 0, -256)}, "outside its bucket"),
            ({"piece_offset": ints(0, 0, 0, 8, 400)}, "outside its bucket"),
            ({"piece_offset": ints(0, 0, 0, 0, 399)}, "multiple of 8"),
            ({"bucket_first": ints(0, 1, 2, 5)}, "share out"),
            ({"bucket_first": ints(0, 1, 1, 3, 5)}, "share out"),
            ({"bucket_first": ints(0, 1, (1 << 63) - 1, -(1 << 63), 5)}, "share out"),
            ({"bucket_nbytes": ints(400, 400, 400, 300)}, "outside its bucket"),
            ({"bucket_nbytes": ints(400, 400, 400, -(1 << 63))}, "size is out of range"),
            ({"bucket_nbytes": ints(400, 400, 400, (1 << 63) - 1)}, "size is out of range"),
            ({"bucket_owner": struct.pack("<4i", 0, 1, 0, -1)}, "negative owner"),
            ({"bucket_owner": struct.pack("<3i", 0, 1, 0)}, "lengths"),
        ],
    )
    def test_refuses_hostile_bytes(self, changes, why):
        good = manifest()
        assert good.bucket_nbytes.tolist() == [400, 400, 400, 407]
        with pytest.raises(CodecError, match=why):
            Manifest.unpack(repacked(good.pack(), **changes))

    def test_refuses_a_tensor_left_out(self):
        m = manifest()
        table = TensorTable((*m.tensors.names, "d"), (*m.tensors.dtypes, "int8"), (*m.tensors.shapes, (1,)))
        with pytest.raises(CodecError, match="'d' has no piece"):
            Manifest.unpack(repacked(m.pack(), tensors=table.pack()))
        none = dict.fromkeys(("piece_tensor", "piece_start", "piece_count", "piece_offset", "bucket_nbytes"), b"")
        with pytest.raises(CodecError, match="no piece"):
            Manifest.unpack(repacked(m.pack(), **none, bucket_owner=b"", bucket_first=ints(0)))

    def test_refuses_pieces_on_top_of_each_other(self):
        m = plan_push([rank(whole("a", "int8", (9,)), whole("b", "int8", (9,)))], slot_bytes=512, owners=1).manifest
        assert m.piece_offset.tolist() == [0, 256]
        for hostile in ((0, 0), (256, 0)):
            with pytest.raises(CodecError, match="overlap"):
                Manifest.unpack(repacked(m.pack(), piece_offset=ints(*hostile)))


def test_arrays_keep_their_types():
    m = manifest()
    for name in ("piece_start", "piece_count", "piece_offset", "bucket_first", "bucket_nbytes"):
        assert getattr(m, name).dtype == np.int64
    assert m.piece_tensor.dtype == m.bucket_owner.dtype == np.int32
    assert layout().tensor.dtype == np.int32
