"""Parts of checkpoint tensors, cut by the trainer's own rules."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from weightsync.errors import SourceError
from weightsync.sources import Part, PartSource, source_of


def test_a_part_is_read_where_it_lies():
    fused = torch.arange(24, dtype=torch.float32).reshape(6, 4)
    gate, up = fused[:3], fused[3:]
    source = source_of(PartSource([Part("gate", (6, 4), (3, 0), gate), Part("up", (6, 4), (3, 0), up)]))
    layout = source.layout()
    assert [layout.shard(i).name for i in range(2)] == ["gate", "up"]
    assert layout.shard(1).offset == (3, 0)
    assert layout.shard(1).global_shape == (6, 4)
    assert source.nbytes == 24 * 4
    local = source.local(1)
    assert local is not None
    assert local.data_ptr() == up.data_ptr()
    out = torch.empty(2, 2)
    source.read_into(1, (1, 2), (2, 2), out)
    assert torch.equal(out, up[1:, 2:])


def test_parts_of_any_strides():
    fused = torch.arange(24, dtype=torch.int32).reshape(4, 6)
    source = PartSource([Part("a", (3, 8), (0, 4), fused[:, ::2].T)])
    out = torch.empty(3, 4, dtype=torch.int32)
    source.read_into(0, (0, 0), (3, 4), out)
    assert torch.equal(out, fused[:, ::2].T)


def test_several_parts_of_one_tensor_and_a_tied_name():
    data = torch.zeros(4, 2)
    source = PartSource([Part("w", (8, 2), (0, 0), data[:2]), Part("w", (8, 2), (4, 0), data[2:])], [("head", "w")])
    assert source.layout().tensors.names == ("w",)
    assert source.layout().tensors.aliases == (("head", "w"),)
    assert len(source.layout()) == 2


def test_one_box_from_two_places_is_refused():
    """Only one of them would be sent, and nobody would hear of the other."""
    one, other = torch.zeros(2, 2), torch.ones(2, 2)
    with pytest.raises(SourceError, match=r"'w'.*offset \(4, 0\).*shape \(2, 2\).*given twice, from different memory"):
        PartSource([Part("w", (8, 2), (4, 0), one), Part("w", (8, 2), (4, 0), other)])
    with pytest.raises(SourceError, match="given twice, from different memory"):
        PartSource([Part("w", (8, 2), (4, 0), one), Part("w", (8, 2), (4, 0), one.T)])


def test_one_box_twice_from_one_place_and_empty_ones_are_fine():
    data, empty = torch.zeros(2, 2), [torch.empty(0, 2) for _ in range(2)]
    parts = [Part("w", (2, 2), (0, 0), data), Part("w", (2, 2), (0, 0), data[:])]
    source = PartSource(parts + [Part("e", (8, 2), (4, 0), one) for one in empty])
    assert source.layout().tensors.names == ("w", "e")


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        (Part("w", (4, 2), (3, 0), torch.zeros(2, 2)), "'w' of shape (4, 2) has a shard outside it"),
        (Part("w", (4, 2), (0,), torch.zeros(2)), "not as many dimensions"),
        (Part("w", (4, 2), (0, 0), cast("torch.Tensor", "no tensor")), "a part of 'w' is str"),
        (Part("w", (4, 2), (0, 0), torch.zeros(2, 2, device="meta")), "'w' is on the meta device"),
    ],
)
def test_what_is_no_part_is_named(part, problem):
    with pytest.raises(SourceError) as error:
        PartSource([part])
    assert problem in str(error.value)
