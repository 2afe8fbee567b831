"""What engine ranks say they hold, compared with what was sent: any tiling, any replicas, any damage, any lie."""

from __future__ import annotations

import itertools
import math
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightsync.adapters.verify import Verifier
from weightsync.errors import CodecError, EngineError
from weightsync.fingerprint import fingerprint
from weightsync.plan.residents import ResidentBoxes
from weightsync.plan.table import TensorTable

if TYPE_CHECKING:
    from collections.abc import Sequence

Box = tuple[int, tuple[int, ...], tuple[int, ...]]  # tensor, offset, shape

TABLE = TensorTable(("a", "b", "c"), ("uint8",) * 3, ((4, 6), (8,), ()))
SHARDED: list[list[Box]] = [  # a by columns, b on both, c on the second alone
    [(0, (0, 0), (4, 3)), (1, (0,), (8,))],
    [(1, (0,), (8,)), (0, (0, 3), (4, 3)), (2, (), ())],
]


def boxes_of(ranks: Sequence[Sequence[Box]], table: TensorTable = TABLE) -> list[ResidentBoxes]:
    """Told as an engine tells it."""
    return [ResidentBoxes.unpack(ResidentBoxes.of(rank, table.width).pack(), table) for rank in ranks]


def weights_of(table: TensorTable) -> list[np.ndarray]:
    random = np.random.default_rng(7)
    return [random.integers(0, 256, shape, np.uint8) for shape in table.shapes]


def fingerprint_of(whole: np.ndarray, offset: tuple[int, ...], shape: tuple[int, ...]) -> int:
    part = whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
    data = np.ascontiguousarray(part).reshape(-1)
    return fingerprint(data, itemsize=1, global_shape=whole.shape, offset=offset, shape=shape)


def sent(weights: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([fingerprint_of(w, (0,) * w.ndim, w.shape) for w in weights], np.uint64)


def held(ranks: Sequence[Sequence[Box]], weights: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Each rank's fingerprints."""
    return [np.array([fingerprint_of(weights[t], o, s) for t, o, s in rank], np.uint64) for rank in ranks]


def as_sent(sums: Sequence[np.ndarray]) -> list[bytes]:
    return [rank.astype("<u8").tobytes() for rank in sums]


@pytest.fixture
def weights() -> list[np.ndarray]:
    return weights_of(TABLE)


def test_what_was_sent_is_found_again_and_again(weights: list[np.ndarray]) -> None:
    verifier = Verifier(boxes_of(SHARDED), TABLE)
    for _ in range(2):
        assert verifier.compare(as_sent(held(SHARDED, weights)), sent(weights)) == 3


def test_the_first_tensor_that_differs_is_named(weights: list[np.ndarray]) -> None:
    verifier, expected = Verifier(boxes_of(SHARDED), TABLE), sent(weights)
    weights[0][2, 4] ^= 1
    weights[2] ^= 1
    got, want = int(sent(weights)[0]), int(expected[0])
    words = rf"^'a' in the engine differs from what the trainer sent \(fingerprint {got:016x}, not {want:016x}\)"
    with pytest.raises(EngineError, match=words) as raised:
        verifier.compare(as_sent(held(SHARDED, weights)), expected)
    assert raised.value.phase == "verify"


def test_replicas_that_differ_are_named_with_their_ranks_and_box(weights: list[np.ndarray]) -> None:
    ranks: list[list[Box]] = [[(1, (0,), (4,))], [(1, (4,), (4,))], [(1, (0,), (4,))], [(1, (4,), (4,))]]
    verifier, sums = Verifier(boxes_of(ranks), TABLE), held(ranks, weights)
    sums[3][0] += 1
    with pytest.raises(EngineError, match=r"tp ranks 1 and 3 hold different bytes of 'b', box \[4\] at \[4\]"):
        verifier.compare(as_sent(sums), sent(weights))


def test_a_tensor_of_which_elements_are_missing_is_named() -> None:
    with pytest.raises(EngineError, match="the engine's ranks hold 12 of the 24 elements of 'a'"):
        Verifier(boxes_of([SHARDED[0], SHARDED[1][2:]]), TABLE)
    with pytest.raises(EngineError, match="the engine's ranks hold 10 of the 8 elements of 'b'"):
        Verifier(boxes_of([[(1, (0,), (5,))], [(1, (3,), (5,))]]), TABLE)


def test_a_tensor_of_which_a_part_is_shown_may_be_left_out(weights: list[np.ndarray]) -> None:
    ranks = [SHARDED[0], SHARDED[1][2:]]
    sums, expected = held(ranks, weights), sent(weights)
    verifier = Verifier(boxes_of(ranks), TABLE, parts=True)
    compared = verifier.compare(as_sent(sums), expected)
    assert 0 < compared < len(expected)
    sums[-1][-1] += 1
    with pytest.raises(EngineError, match="differs from what the trainer sent"):
        verifier.compare(as_sent(sums), expected)


def test_boxes_that_overlap_and_leave_as_much_out_are_no_tiling() -> None:
    with pytest.raises(EngineError, match="boxes that the engine's ranks hold of 'b' overlap"):
        Verifier(boxes_of([[(1, (0,), (4,))], [(1, (2,), (4,))]]), TABLE)


def test_tensors_that_are_not_shown_are_not_counted(weights: list[np.ndarray]) -> None:
    ranks: list[list[Box]] = [[], [(1, (0,), (8,))]]
    assert Verifier(boxes_of(ranks), TABLE).compare(as_sent(held(ranks, weights)), sent(weights)) == 1
    assert Verifier(boxes_of([[], []]), TABLE).compare([b"", b""], sent(weights)) == 0


def test_scalars_alone_have_no_dimensions() -> None:
    table = TensorTable(("s",), ("uint8",), ((),))
    ranks: list[list[Box]] = [[(0, (), ())], [(0, (), ())]]
    weights = weights_of(table)
    assert Verifier(boxes_of(ranks, table), table).compare(as_sent(held(ranks, weights)), sent(weights)) == 1


@pytest.mark.parametrize(
    ("fingerprints", "words"),
    [
        ([], "0 of the engine's 2 ranks answered"),
        ([b"\0" * 16], "1 of the engine's 2 ranks answered"),
        ([b"\0" * 16, b"\0" * 16], "tp rank 1 holds 3 boxes and sent 16 bytes of fingerprints, not 24"),
        ([b"\0" * 15, b"\0" * 24], "tp rank 0 holds 2 boxes and sent 15 bytes"),
    ],
)
def test_fingerprints_that_do_not_fit_the_boxes(fingerprints: list[bytes], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        Verifier(boxes_of(SHARDED), TABLE).compare(fingerprints, np.zeros(3, np.uint64))


@pytest.mark.parametrize(
    "box",
    [
        (0, (0, 0), (4, 7)),
        (0, (0, 6), (4, 1)),
        (0, (-1, 0), (4, 6)),
        (0, (0, 0), (0, 6)),
        (0, (0, 0), (4, -6)),
        (0, (0, -(1 << 63)), (4, 1)),
        (0, (0, 1), (4, (1 << 63) - 1)),
        (1, (0, 1), (8, 1)),
        (1, (0,), (8, 2)),
        (2, (), (2,)),
    ],
)
def test_residents_outside_their_tensor_are_refused(box: Box) -> None:
    with pytest.raises(CodecError, match=f"a resident of '{TABLE.names[box[0]]}' is empty or does not lie in"):
        ResidentBoxes.unpack(ResidentBoxes.of([(1, (0,), (8,)), box], 2).pack(), TABLE)


@pytest.mark.parametrize("tensor", [-1, 3])
def test_residents_of_no_tensor_are_refused(tensor: int) -> None:
    with pytest.raises(CodecError, match="not there"):
        ResidentBoxes.unpack(ResidentBoxes.of([(tensor, (0,), (1,))], 2).pack(), TABLE)


@pytest.mark.parametrize("change", [{"tensor": b""}, {"offset": b"\0" * 8}, {"shape": b"\0"}, {"format": 2}, {"x": 1}])
def test_residents_that_are_malformed_are_refused(change: dict[str, object]) -> None:
    good = msgspec.msgpack.decode(ResidentBoxes.of([(1, (0,), (8,))], 2).pack())
    with pytest.raises(CodecError):
        ResidentBoxes.unpack(msgspec.msgpack.encode(good | change), TABLE)


@given(st.binary(max_size=64))
def test_any_bytes_are_residents_or_a_codec_error(data: bytes) -> None:
    with suppress(CodecError):
        ResidentBoxes.unpack(data, TABLE)


@st.composite
def tilings(draw: st.DrawFn) -> tuple[TensorTable, list[list[Box]]]:
    """Tensors, some shown; each cut by a grid, every box of it on one rank or several, in any order."""
    shapes = draw(
        st.lists(st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=5).map(lambda s: tuple(s))
    )
    ranks: list[list[Box]] = [[] for _ in range(draw(st.integers(1, 4)))]
    holders = st.sets(st.integers(0, len(ranks) - 1), min_size=1)
    for tensor, shape in enumerate(shapes):
        if not draw(st.booleans()):
            continue
        cuts = [sorted(draw(st.sets(st.integers(1, n - 1))) if n > 1 else ()) for n in shape]
        spans = [list(itertools.pairwise([0, *cut, n])) for cut, n in zip(cuts, shape, strict=True)]
        for box in itertools.product(*spans):
            for rank in draw(holders):
                ranks[rank].append((tensor, tuple(low for low, _ in box), tuple(high - low for low, high in box)))
    names = tuple(f"t{i}" for i in range(len(shapes)))
    return TensorTable(names, ("uint8",) * len(shapes), shapes), [draw(st.permutations(rank)) for rank in ranks]


@given(tilings(), st.data())
def test_any_tiling_is_found_equal_and_a_flipped_bit_in_any_one_box_is_found(
    tiling: tuple[TensorTable, list[list[Box]]], data: st.DataObject
) -> None:
    table, ranks = tiling
    weights = weights_of(table)
    verifier, sums, expected = Verifier(boxes_of(ranks, table), table), held(ranks, weights), sent(weights)
    assert verifier.compare(as_sent(sums), expected) == len({tensor for rank in ranks for tensor, _, _ in rank})
    places = [(rank, at) for rank, boxes in enumerate(ranks) for at in range(len(boxes))]
    if not places:
        return
    rank, at = data.draw(st.sampled_from(places))
    tensor, offset, shape = ranks[rank][at]
    damaged = weights[tensor].copy()
    element = tuple(o + data.draw(st.integers(0, n - 1)) for o, n in zip(offset, shape, strict=True))
    damaged[element] ^= np.uint8(1 << data.draw(st.integers(0, 7)))
    sums[rank][at] = fingerprint_of(damaged, offset, shape)
    with pytest.raises(EngineError, match=f"'{table.names[tensor]}'"):
        verifier.compare(as_sent(sums), expected)


@given(tilings(), st.data())
def test_a_box_that_nobody_holds_is_missed(tiling: tuple[TensorTable, list[list[Box]]], data: st.DataObject) -> None:
    table, ranks = tiling
    every = sorted({box for rank in ranks for box in rank})
    if not every:
        return
    tensor, _, shape = gone = data.draw(st.sampled_from(every))
    left = [[box for box in rank if box != gone] for rank in ranks]
    if not any(box[0] == tensor for rank in left for box in rank):
        return  # it was all that was shown of its tensor
    whole = table.numel(tensor)
    words = f"hold {whole - math.prod(shape)} of the {whole} elements of '{table.names[tensor]}'"
    with pytest.raises(EngineError, match=words):
        Verifier(boxes_of(left, table), table)
