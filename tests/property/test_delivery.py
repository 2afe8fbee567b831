"""Whatever ranks expose and an engine has places for: what was packed into pieces at one end and taken out of them at
the other is what the tensors hold there.
"""

from __future__ import annotations

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
from weightsync.plan.delivery import incoming, outgoing, pieces_of
from weightsync.plan.exposure import Exposure, Part, Region
from weightsync.plan.table import TensorTable

MOST = 256  # bytes of a piece: most tensors are cut


def places_of(case, ranks):
    """Those of an engine of so many ranks, which share out what is wanted."""
    region = Region(nbytes=1 << 16, name="y", fd=4)
    parts = [Part(one.tensor, one.offset, one.shape, 0, one.at, one.strides) for one in case.wanted]
    return [Exposure.of(8, "1", [region], parts[rank::ranks], case.table.width) for rank in range(ranks)]


def bases_of(case, ranks):
    _, parts = case.places
    return np.concatenate(parts), np.array([case.targets.ctypes.data] * ranks, dtype=np.uint64).view(np.int64)


@given(case=cases, ranks=st.integers(1, 3), turns=st.integers(1, 3), data=st.data())
def test_what_is_delivered_is_what_is_held(case, ranks, turns, data):
    turn = data.draw(st.integers(0, turns - 1))
    pieces = pieces_of(places_of(case, ranks), case.table, MOST, turn=turn, turns=turns)
    assert all(0 < piece.nbytes <= MOST for piece in pieces)
    sources, places = bases_of(case, ranks)
    fill = HostStaged(outgoing(pieces, case.exposures, case.table), packing=True)
    empty = HostStaged(incoming(pieces), packing=False)
    for at, piece in enumerate(pieces):
        buffer = np.full(piece.nbytes, 0xEE, dtype=np.uint8)
        fill.run(at, sources, buffer.ctypes.data)
        empty.run(at, places, buffer.ctypes.data)
    case.check()


@given(case=cases, ranks=st.integers(1, 3))
def test_and_so_it_is_on_a_gpu(case, ranks, kernel):  # noqa: F811
    pieces = pieces_of(places_of(case, ranks), case.table, MOST)
    sources, places = bases_of(case, ranks)
    device, stream = torch.device("cpu"), cast("torch.cuda.Stream", None)
    fill = DeviceStaged(kernel, device, outgoing(pieces, case.exposures, case.table), packing=True)
    empty = DeviceStaged(kernel, device, incoming(pieces), packing=False)
    fill.begin(sources)
    empty.begin(places)
    for at, piece in enumerate(pieces):
        buffer = np.full(piece.nbytes, 0xEE, dtype=np.uint8)
        fill.launch(at, buffer.ctypes.data, stream)
        empty.launch(at, buffer.ctypes.data, stream)
    case.check()


@given(case=cases, turns=st.integers(2, 4))
def test_turns_begin_elsewhere_and_bring_the_same(case, turns):
    def brought(turn):
        pieces = pieces_of(places_of(case, 2), case.table, MOST, turn=turn, turns=turns)
        return [box._replace(begin=0) for piece in pieces for box in piece.boxes]

    first = brought(0)
    for turn in range(turns):
        cut = len(first) * turn // turns
        assert brought(turn) == first[cut:] + first[:cut]


def test_a_piece_without_room_is_refused():
    table = TensorTable(names=("w",), dtypes=("float32",), shapes=((4, 4),), aliases=())
    with pytest.raises(LocalProtocolError, match="64 bytes at least"):
        pieces_of([], table, 63)
