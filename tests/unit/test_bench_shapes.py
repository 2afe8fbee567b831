"""Shapes made from published configs are those of the published checkpoints."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest

from bench import shapes
from weightsync.adapters.reference.config import read_config
from weightsync.adapters.reference.sharding import checkpoint_tensors
from weightsync.errors import ConfigError

TYPES = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float32": "F32"}
QWEN = [name for name in shapes.names() if name.startswith("qwen3")]


def test_the_models_are_those_that_the_docs_name():
    assert shapes.names() == [
        "deepseek-v3",
        "llama-3-70b",
        "qwen3-0.6b",
        "qwen3-235b-a22b",
        "qwen3-30b-a3b",
        "qwen3-8b",
    ]


@pytest.mark.parametrize("name", shapes.names())
def test_parameters_and_tensors_are_as_many_as_published(name):
    model = shapes.load(name)
    counted: Counter[str] = Counter()
    for tensor in model.tensors.values():
        counted[TYPES[tensor.dtype]] += math.prod(tensor.shape)
    tensors = len(model.tensors)
    if model.config["tie_word_embeddings"]:  # the checkpoint holds the tied head, which no trainer sends
        counted["BF16"] += model.config["vocab_size"] * model.config["hidden_size"]
        tensors += 1
    assert counted == model.published["parameters"]
    assert tensors == model.published["tensors"]


@pytest.mark.parametrize(
    ("name", "nbytes"),
    [
        ("qwen3-8b", 16_381_470_720),
        ("qwen3-30b-a3b", 61_064_245_248),
        ("qwen3-235b-a22b", 470_187_269_120),
        ("llama-3-70b", 141_107_412_992),
    ],
)
def test_bytes_are_the_total_size_of_the_published_index(name, nbytes):
    assert shapes.load(name).nbytes == nbytes


@pytest.mark.parametrize("name", QWEN)
def test_the_reference_engine_has_the_same_tensors(name, tmp_path):
    model = shapes.load(name).with_layers(3)
    model.write(tmp_path)
    expected = checkpoint_tensors(read_config(tmp_path))
    assert {tensor: found.shape for tensor, found in model.tensors.items()} == expected


def test_names_of_deepseek_are_the_published_ones():
    tensors = shapes.load("deepseek-v3").tensors
    layer = "model.layers.60"
    assert tensors[f"{layer}.mlp.experts.255.down_proj.weight"] == ((7168, 2048), "float8_e4m3fn")
    assert tensors[f"{layer}.mlp.experts.255.down_proj.weight_scale_inv"] == ((56, 16), "float32")
    assert tensors[f"{layer}.self_attn.kv_a_proj_with_mqa.weight_scale_inv"] == ((5, 56), "float32")
    assert tensors["model.layers.61.eh_proj.weight"] == ((7168, 14336), "bfloat16")
    assert "model.layers.2.mlp.gate_proj.weight" in tensors
    assert "model.layers.3.mlp.gate_proj.weight" not in tensors


def test_fewer_layers_and_layers_that_fit():
    model = shapes.load("qwen3-0.6b")
    one = model.with_layers(1)
    layer = model.with_layers(2).nbytes - one.nbytes
    assert model.nbytes == one.nbytes + 27 * layer
    assert model.fitting(one.nbytes + 5 * layer) == model.with_layers(6)
    assert model.fitting(one.nbytes + 5 * layer - 1) == model.with_layers(5)
    assert model.fitting(1) == one
    assert model.fitting(10**12) == model
    with pytest.raises(ConfigError, match="--layers 0"):
        model.with_layers(0)


def test_a_config_file_will_do(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(shapes.load("llama-3-70b").config))
    assert shapes.load(str(path)).tensors == shapes.load("llama-3-70b").tensors


@pytest.mark.parametrize(
    ("text", "why"), [("{", "no shape file"), ("[]", "object"), ('{"model_type": "gpt2"}', "gpt2")]
)
def test_what_is_no_shape_is_refused_by_name(tmp_path, text, why):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=why):
        shapes.load(str(path))
