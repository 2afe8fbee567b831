"""Weights sent in another element type than the one they are held in."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from weightsync.errors import SourceError
from weightsync.plan.dtypes import BY_NAME
from weightsync.plan.manifest import Shard
from weightsync.sources import CheckpointSource, Source, TensorSource, source_of
from weightsync.sources import converted as conversions
from weightsync.trainer.client import push_weights


def mixed() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {
        "f64": torch.rand(6, 8, generator=generator).double(),
        "f32": torch.rand(6, 8, generator=generator),
        "f16": torch.rand(6, 8, generator=generator).half(),
        "bf16": torch.rand(6, 8, generator=generator).bfloat16(),
        "f8": torch.rand(6, 8, generator=generator).to(torch.float8_e4m3fn),
        "i64": torch.arange(48).reshape(6, 8),
        "flags": torch.tensor([True, False]),
        "scale": torch.tensor(1.1),
        "none": torch.empty(0, 3),
    }
    return made | {"tied": made["f32"]}


def read(source: Source, shard: int) -> torch.Tensor:
    held = source.layout().shard(shard)
    out = torch.empty(held.shape, dtype=getattr(torch, held.dtype))
    source.read_into(shard, (0,) * out.dim(), held.shape, out)
    return out


def sent_as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.itemsize > 1 else tensor


def check(source: Source, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    layout = source.layout()
    total = 0
    for i in range(len(layout)):
        shard = layout.shard(i)
        expected = sent_as(weights[shard.name].detach(), dtype)
        assert shard.dtype == str(expected.dtype).removeprefix("torch.")
        out = read(source, i)
        assert out.dtype == expected.dtype
        assert out.contiguous().view(-1).view(torch.uint8).equal(expected.contiguous().view(-1).view(torch.uint8))
        data = source.box_bytes(i, (0,) * expected.dim(), shard.shape)
        if weights[shard.name].dtype != expected.dtype:
            assert data is None
        total += expected.nbytes
    assert source.nbytes == total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floating_point_is_converted_and_nothing_else(dtype):
    weights = mixed()
    for given in (dtype, str(dtype), str(dtype).removeprefix("torch.")):
        source = source_of(weights, dtype=given)
        check(source, weights, dtype)
        assert isinstance(source, Source)
        assert source.layout().tensors.aliases == (("tied", "f32"),)


def test_a_box_into_strided_memory():
    tensor = torch.rand(6, 8)
    source = source_of({"t": tensor.T}, dtype="bfloat16")
    assert source.layout().shard(0) == Shard("t", "bfloat16", (8, 6), (0, 0), (8, 6))
    slot = torch.zeros(9, 9, dtype=torch.bfloat16)
    source.read_into(0, (2, 1), (4, 3), slot[1:5, ::3])
    assert slot[1:5, ::3].equal(tensor.T[2:6, 1:4].bfloat16())
    assert source.box_bytes(0, (0, 0), (1, 1)) is None
    for wrong in (torch.empty(4, 3), torch.empty(4, 4, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="does not go into"):
            source.read_into(0, (2, 1), (4, 3), wrong)


def test_memory_stays_what_it_is():
    weights = mixed()
    source = source_of(weights, dtype="bfloat16")
    names = source.layout().tensors.names
    for i, name in enumerate(names):
        local = source.local(i)
        assert local is not None
        assert local.dtype == weights[name].dtype
        assert local.data_ptr() == weights[name].data_ptr()


def test_a_parameter_gives_no_gradient_away():
    module = nn.Linear(3, 2)
    for _ in range(2):
        out = read(source_of(module, dtype=torch.bfloat16), 0)
        assert not out.requires_grad
        assert out.equal(module.weight.detach().bfloat16())


def test_what_needs_no_conversion_is_left_alone():
    weights = {"t": torch.zeros(2), "i": torch.zeros(2, dtype=torch.int8)}
    source = source_of(weights, dtype="float32")
    assert isinstance(source, TensorSource)
    assert source.box_bytes(0, (0,), (2,)) is not None


def test_each_dtype_has_a_layout_of_its_own_that_is_kept():
    weights = mixed()
    layouts = {dtype: source_of(weights, dtype=dtype).layout() for dtype in (None, "bfloat16", "float16")}
    assert len({layout.digest for layout in layouts.values()}) == 3
    for dtype, layout in layouts.items():
        assert source_of(weights, dtype=dtype).layout() is layout
    weights["f32"] = torch.rand(2)
    assert source_of(weights, dtype="bfloat16").layout().tensors.shapes[1] == (2,)


def test_layouts_go_with_what_they_were_made_from():
    before = len(conversions._LAYOUTS)
    source = conversions.converted(TensorSource({"only here": torch.zeros(2)}), "bfloat16")
    assert len(conversions._LAYOUTS) == before + 1
    layout = weakref.ref(source.layout())
    del source
    gc.collect()
    assert len(conversions._LAYOUTS) == before
    assert layout() is None


@pytest.mark.parametrize(
    "given", [torch.int8, "int32", "bool", "float8_e4m3fn", "bf16", "", "torch", 16, float, object]
)
def test_what_is_no_such_dtype(given):
    with pytest.raises(SourceError, match=r"dtype = .* is nothing that weights can be converted to") as caught:
        source_of({"t": torch.zeros(1)}, dtype=given)
    assert "bfloat16" in str(caught.value)
    with pytest.raises(SourceError, match="nothing that weights can be converted to"):
        push_weights({"t": torch.zeros(1)}, version=1, dtype=given)


def test_every_dtype_is_known_to_be_converted_or_not():
    assert {"float32", "float16", "bfloat16", "float64"} == set(conversions._FLOATING)
    for name, dtype in BY_NAME.items():
        kind = getattr(torch, name)
        assert (name in conversions._FLOATING) == (kind.is_floating_point and dtype.itemsize > 1)


def test_a_checkpoint(tmp_path, monkeypatch):
    weights = {name: tensor for name, tensor in mixed().items() if name != "tied"}
    save_file(weights, tmp_path / "model.safetensors")
    for scratch in (1 << 22, 64, 8):  # bytes: whole, by rows, element by element
        monkeypatch.setattr(conversions, "_SCRATCH", scratch)
        with CheckpointSource(tmp_path) as source:
            assert source.local(0) is None
            as_bfloat16 = source_of(source, dtype="bfloat16")
            assert as_bfloat16.local(0) is None
            check(as_bfloat16, weights, torch.bfloat16)
