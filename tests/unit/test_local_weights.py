"""What a rank notes of where its weights lie, and by which a program for a GPU is found fit to be used again."""

from __future__ import annotations

import torch

from weightsync.filling.local import LocalWeights
from weightsync.sources import source_of


def weights() -> dict[str, torch.Tensor]:
    return {
        "plain": torch.rand(3, 4),
        "turned": torch.rand(4, 3).t(),
        "part": torch.rand(4, 8)[:, 2:6],
        "one": torch.rand(()),
    }


def test_addresses_types_and_the_strides_of_what_is_not_packed():
    w = weights()
    local = LocalWeights(source_of(w))
    assert local.pointers == [tensor.data_ptr() for tensor in w.values()]
    assert local.dtypes == [torch.float32] * 4
    assert local.gpus == [-1] * 4
    assert local.strides == {1: (1, 3), 2: (8, 1)}
    assert local.ready() == []


def test_tensors_turned_in_place_are_told_apart():
    w = {"square": torch.rand(3, 3), "plain": torch.rand(2)}
    before = LocalWeights(source_of(w))
    w["square"].t_()
    after = LocalWeights(source_of(w))
    assert before.pointers == after.pointers
    assert before.layout is after.layout
    assert before.strides != after.strides


def test_sources_of_one_layout_hold_their_tensors_in_the_same_types():
    """Where the layout is the very same object types are not compared."""
    masters = {"a": torch.rand(2, 2), "b": torch.rand(3)}
    cast = {name: tensor.bfloat16() for name, tensor in masters.items()}
    converted = LocalWeights(source_of(masters, dtype="bfloat16"))
    plain = LocalWeights(source_of(cast, dtype="bfloat16"))
    assert converted.layout == plain.layout
    assert converted.layout is not plain.layout
    assert converted.layout is LocalWeights(source_of(masters, dtype="bfloat16")).layout
    assert converted.dtypes != plain.dtypes


def test_shards_that_lie_in_no_tensor(tmp_path):
    from safetensors.torch import save_file

    from weightsync.sources import CheckpointSource

    save_file({"a": torch.rand(2)}, tmp_path / "model.safetensors")
    local = LocalWeights(CheckpointSource(tmp_path))
    assert (local.tensors, local.gpus, local.strides) == ([None], [-1], {})
