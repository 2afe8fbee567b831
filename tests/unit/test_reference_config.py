"""config.json: written for everybody, read from anybody, refused by key."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from weightsync.adapters.reference.config import ModelConfig, read_config, write_config
from weightsync.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

DENSE = ModelConfig(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    eos_token_id=(7, 9),
)
MOE = ModelConfig(
    architecture="Qwen3MoeForCausalLM",
    vocab_size=100,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rope_theta=1e6,
    tie_word_embeddings=True,
    dtype="bfloat16",
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    norm_topk_prob=True,
    decoder_sparse_step=2,
    mlp_only_layers=(3,),
)


@pytest.mark.parametrize("config", [DENSE, MOE])
def test_what_is_written_is_read_back(config: ModelConfig, tmp_path: Path) -> None:
    write_config(config, tmp_path)
    assert read_config(tmp_path) == config


def test_it_reads_what_transformers_5_writes(tmp_path: Path) -> None:
    write_config(MOE, tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    del document["rope_theta"], document["torch_dtype"], document["num_experts"]
    document |= {
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
        "num_local_experts": 8,
        "dtype": "float16",
        "eos_token_id": 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(document))
    expected = msgspec.structs.replace(MOE, rope_theta=5e5, dtype="float16", eos_token_id=(3,))
    assert read_config(tmp_path) == expected


def test_which_layers_have_experts() -> None:
    assert [MOE.sparse(layer) for layer in range(4)] == [False, True, False, False]
    assert not any(DENSE.sparse(layer) for layer in range(2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 0}, r"vocab_size"),
        ({"hidden_size": "32"}, r"hidden_size"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads"),
        ({"head_dim": 15}, r"head_dim"),
        ({"architectures": ["LlamaForCausalLM"]}, r"architecture"),
        ({"dtype": "int8", "torch_dtype": "int8"}, r"dtype"),
        ({"rope_scaling": {"rope_type": "yarn"}}, r"rope_parameters"),
        ({"attention_bias": True}, r"attention_bias"),
        ({"hidden_act": "gelu"}, r"hidden_act"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok"),
        ({"moe_intermediate_size": 0}, r"moe_intermediate_size"),
    ],
)
def test_errors_name_the_key(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_config(MOE, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=words):
        read_config(tmp_path)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_no_config_at_all(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config(tmp_path)
