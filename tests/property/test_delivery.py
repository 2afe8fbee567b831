"""Whatever ranks expose and an engine has places for: what was packed into parcels at one end and taken out of them at
the other is what the tensors hold there.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.property.test_draws import cases, kernel  # noqa: F401 (a fixture)
from weightsync.drawing.device import DeviceStaged
from weightsync.drawing.host import HostStaged
from weightsync.errors import LocalProtocolError
from weightsync.plan.delivery import boxes_of, incoming, outgoing, parcels_of, share_of
from weightsync.plan.exposure import Exposure, Part, Region
from weightsync.plan.table import TensorTable

MOST = 256  # bytes of a parcel: most tensors are cut


def places_of(case, ranks):
    """Those of an engine of so many ranks, which share out what is wanted."""
    region = Region(nbytes=1 << 16, name="y", fd=4)
    parts = [Part(one.tensor, one.offset, one.shape, 0, one.at, one.strides) for one in case.wanted]
    return [Exposure.of(8, "1", [region], parts[rank::ranks], case.table.width) for rank in range(ranks)]


def bases_of(case, ranks):
    _, parts = case.places
    return np.concatenate(parts), np.array([case.targets.ctypes.data] * ranks, dtype=np.uint64).view(np.int64)


def boxes_for(case, places, whole, turn=0, turns=1):
    if whole:
        return share_of(case.table, turn=turn, turns=turns)
    return boxes_of(places, case.table, turn=turn, turns=turns)


@given(case=cases, ranks=st.integers(1, 3), turns=st.integers(1, 3), whole=st.booleans())
def test_what_is_delivered_is_what_is_held(case, ranks, turns, whole):
    """In one delivery of what was asked for, or in several of a share of the model each."""
    places = places_of(case, ranks)
    sources, regions = bases_of(case, ranks)
    for turn in range(turns) if whole else (turns - 1,):
        parcels = parcels_of(boxes_for(case, places, whole, turn, turns), case.table, MOST)
        assert all(0 < parcel.nbytes <= MOST for parcel in parcels)
        fill = HostStaged(outgoing(parcels, case.exposures, case.table), packing=True)
        empty = HostStaged(incoming(parcels, places, case.table), packing=False)
        for at, parcel in enumerate(parcels):
            buffer = np.full(parcel.nbytes, 0xEE, dtype=np.uint8)
            fill.run(at, sources, buffer.ctypes.data)
            empty.run(at, regions, buffer.ctypes.data)
    case.check()


@given(case=cases, ranks=st.integers(1, 3), whole=st.booleans())
def test_and_so_it_is_on_a_gpu(case, ranks, whole, kernel):  # noqa: F811
    places = places_of(case, ranks)
    parcels = parcels_of(boxes_for(case, places, whole), case.table, MOST)
    sources, regions = bases_of(case, ranks)
    device, stream = torch.device("cpu"), cast("torch.cuda.Stream", None)
    fill = DeviceStaged(kernel, device, outgoing(parcels, case.exposures, case.table), packing=True)
    empty = DeviceStaged(kernel, device, incoming(parcels, places, case.table), packing=False)
    fill.begin(sources)
    empty.begin(regions)
    for at, parcel in enumerate(parcels):
        buffer = np.full(parcel.nbytes, 0xEE, dtype=np.uint8)
        fill.launch(at, buffer.ctypes.data, stream)
        empty.launch(at, buffer.ctypes.data, stream)
    case.check()


@given(case=cases, turns=st.integers(2, 4))
def test_turns_begin_elsewhere_and_bring_the_same(case, turns):
    first = boxes_of(places_of(case, 2), case.table)
    for turn in range(turns):
        cut = len(first) * turn // turns
        assert boxes_of(places_of(case, 2), case.table, turn=turn, turns=turns) == first[cut:] + first[:cut]


@given(case=cases, turns=st.integers(1, 5))
def test_shares_are_of_each_tensor_once(case, turns):
    shared = [box for turn in range(turns) for box in share_of(case.table, turn=turn, turns=turns)]
    assert shared == share_of(case.table)
    assert [box.tensor for box in shared] == list(range(len(case.table)))


@given(case=cases)
def test_no_parcel_would_have_had_room_for_the_next_box(case):
    parcels = parcels_of(share_of(case.table, turn=0, turns=1), case.table, MOST)
    for parcel, following in pairwise(parcels):
        first = following.boxes[0]
        assert parcel.nbytes + math.prod(first.box.shape) * first.itemsize > MOST


def test_parcels_are_filled_to_the_last_byte():
    """Of a tensor with rows of 64 bytes a parcel takes four; what is left shares one with the next tensor."""
    table = TensorTable(names=("w", "v"), dtypes=("float32",) * 2, shapes=((2, 9, 16), (2, 16)), aliases=())
    parcels = parcels_of(share_of(table, turn=0, turns=1), table, MOST)
    assert [[(placed.box.tensor, placed.box.offset, placed.box.shape) for placed in p.boxes] for p in parcels] == [
        [(0, (0, 0, 0), (1, 4, 16))],
        [(0, (0, 4, 0), (1, 4, 16))],
        [(0, (0, 8, 0), (1, 1, 16))],
        [(0, (1, 0, 0), (1, 4, 16))],
        [(0, (1, 4, 0), (1, 4, 16))],
        [(0, (1, 8, 0), (1, 1, 16)), (1, (0, 0), (2, 16))],
    ]
    assert [parcel.nbytes for parcel in parcels] == [256, 256, 64, 256, 256, 192]


def test_what_several_ranks_have_travels_once():
    table = TensorTable(names=("w",), dtypes=("float32",), shapes=((4, 4),), aliases=())
    region = Region(nbytes=64, name="y", fd=4)
    both = [Exposure.of(8, "1", [region], [Part(0, (0, 0), (4, 4), 0, 0, (16, 4))], 2)] * 2
    (parcel,) = parcels_of(boxes_of(both, table), table, MOST)
    assert parcel.nbytes == 64
    assert [staged.base for staged in incoming([parcel], both, table)[0]] == [0, 1]


def test_a_piece_without_room_is_refused():
    table = TensorTable(names=("w",), dtypes=("float32",), shapes=((4, 4),), aliases=())
    with pytest.raises(LocalProtocolError, match="64 bytes at least"):
        parcels_of([], table, 63)
