"""Layers that quantise themselves, loaded again: as SGLang's fp8 method does it, on a CPU and with int8."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from weightsync.adapters.sglang import requantise
from weightsync.adapters.sglang.requantise import Requantiser, quantise_once, remembered
from weightsync.errors import LocalProtocolError


class FusedParameter(torch.nn.Parameter):
    """Knows how to place one of the layer's parts in it, as SGLang's parameters do."""

    weight_loader: Any


class Quantises:
    """Takes `weight`, leaves it quantised and transposed, with a scale for each row."""

    quant_config = SimpleNamespace(is_checkpoint_fp8_serialized=False)

    def process_weights_after_loading(self, layer: Any) -> None:
        quantise_once(Quantises._quantise, self, layer)  # as SGLang calls a hook around a method

    def _quantise(self, layer: Any) -> None:
        assert layer.weight.dtype == torch.float32
        scale = layer.weight.data.abs().amax(1, keepdim=True) / 127
        layer.weight = torch.nn.Parameter((layer.weight.data / scale).round().to(torch.int8).t(), requires_grad=False)
        layer.weight_scale = torch.nn.Parameter(scale, requires_grad=False)


class Fused(torch.nn.Module):
    def __init__(self, parts: int) -> None:
        super().__init__()
        weight = FusedParameter(torch.zeros(4 * parts, 8), requires_grad=False)
        weight.weight_loader = lambda p, tensor, part: p.data[4 * part : 4 * part + 4].copy_(tensor)
        self.weight = weight
        self.bias = torch.nn.Parameter(torch.zeros(4 * parts), requires_grad=False)
        self.quant_method = Quantises()


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = Fused(3)
        self.o_proj = Fused(1)
        self.norm = torch.nn.LayerNorm(8, bias=False)

    def load_weights(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            module, _, kind = name.partition(".")
            parts = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
            layer = self.qkv_proj if module in parts else getattr(self, module)
            part = parts.get(module, 0)
            if kind == "bias":
                layer.bias.data[4 * part : 4 * part + 4].copy_(tensor)
            elif module == "norm":
                layer.weight.data.copy_(tensor)
            else:
                layer.weight.weight_loader(layer.weight, tensor, part)


NAMES = [f"{m}_proj.{kind}" for m in "qkvo" for kind in ("weight", "bias")] + ["norm.weight"]


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (4, 8), "bias": (4,)}
    return {
        name: torch.randn((8,) if name == "norm.weight" else shapes[name.partition(".")[2]], generator=generator)
        for name in NAMES
    }


def started(seed: int) -> Model:
    model = Model()
    model.load_weights(list(weights(seed).items()))
    end_of_session(model)
    return model


def same(one: Model, other: Model) -> bool:
    theirs = dict(other.named_parameters())
    return all(torch.equal(p, theirs[name]) for name, p in one.named_parameters())


def push(model: Model, seed: int, buckets: list[list[str]]) -> None:
    again = Requantiser(model, NAMES)
    new = weights(seed)
    for names in buckets:
        with again.loading(names):
            model.load_weights([(name, new[name]) for name in names])
    again.finish()


def end_of_session(model: Model) -> None:
    for layer in (model.qkv_proj, model.o_proj):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_a_model_loaded_again_is_one_started_on_those_weights(size: int) -> None:
    """In buckets that cut layers anywhere; what kernels hold stays where it is."""
    model = started(1)
    held = {name: (p.data_ptr(), id(p)) for name, p in model.named_parameters()}
    push(model, 2, [NAMES[i : i + size] for i in range(0, len(NAMES), size)])
    assert same(model, started(2))
    assert {name: (p.data_ptr(), id(p)) for name, p in model.named_parameters()} == held
    push(model, 1, [NAMES])
    assert same(model, started(1))


def test_what_is_quantised_is_not_quantised_once_more() -> None:
    """The end of SGLang's session has every layer do so again, whether a push went well or broke off."""
    model = started(1)
    push(model, 2, [NAMES])
    held = {name: id(p) for name, p in model.named_parameters()}
    end_of_session(model)
    assert same(model, started(2))
    assert {name: id(p) for name, p in model.named_parameters()} == held
    broken = Requantiser(model, NAMES)
    with broken.loading(["q_proj.weight"]):
        model.load_weights([("q_proj.weight", weights(1)["q_proj.weight"])])
    end_of_session(model)  # of it qkv_proj was put back
    assert model.qkv_proj.weight.dtype == torch.int8
    broken.abandon()
    end_of_session(model)
    assert {name: id(p) for name, p in model.named_parameters()} == held
    push(model, 1, [NAMES])
    assert same(model, started(1))


def test_a_layer_without_all_of_its_tensors_is_named() -> None:
    model = started(1)
    with pytest.raises(LocalProtocolError, match=r"without 'k_proj\.bias'"):
        push(model, 2, [["q_proj.weight"]])


def test_an_update_that_was_given_up_leaves_the_next_one_whole() -> None:
    model = started(1)
    broken = Requantiser(model, NAMES)
    with pytest.raises(KeyError), broken.loading(["q_proj.weight"]):
        raise KeyError
    assert model.qkv_proj.weight.dtype == torch.float32
    broken.abandon()
    assert model.qkv_proj.weight.dtype == torch.int8
    push(model, 2, [NAMES])
    assert same(model, started(2))


def test_models_that_need_nothing_are_left_alone() -> None:
    plain = Model()
    assert not remembered(plain)
    push(plain, 2, [NAMES])
    assert plain.qkv_proj.weight.dtype == torch.float32
    calls = []
    for serialised, own_way in ((True, False), (False, True)):
        config = SimpleNamespace(is_checkpoint_fp8_serialized=serialised, use_mxfp8=own_way)
        for _ in range(2):
            quantise_once(lambda *given: calls.append(given), SimpleNamespace(quant_config=config), plain.o_proj)
    assert len(calls) == 4, "each is SGLang's to make"
    assert not remembered(plain)
    own = started(1)
    assert remembered(own)
    own.flash_rl_initial_load_complete = True  # type: ignore[assignment]
    assert not remembered(own), "SGLang's own loader sees to it"


def test_the_hooks_are_on_methods_that_sglang_has_had() -> None:
    assert [name.rpartition(".")[2] for name in requantise.HOOKED] == ["Fp8LinearMethod", "Fp8MoEMethod"]
