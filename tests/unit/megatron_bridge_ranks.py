"""Run by torchrun for test_sources_megatron.py: checkpoints that mbridge put into Megatron ranks, declared again."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from mbridge import AutoBridge
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from safetensors.torch import save_file
from transformers import AutoConfig

from tests.megatron_kit import Shape, as_transformer_engine, checkpoint, without_gpus
from tests.unit.megatron_ranks import MOE, OUT, QWEN2, QWEN3, TIED, record_case
from weightsync.errors import SourceError
from weightsync.sources import MegatronSource
from weightsync.sources.megatron import FAMILIES

if TYPE_CHECKING:
    from pathlib import Path

CASES: dict[str, tuple[Shape, dict[str, int]]] = {
    "tp2": (QWEN2, {"tp": 2}),
    "pp2": (QWEN3, {"pp": 2}),
    "tied": (TIED, {"pp": 2}),
    "experts": (MOE, {"tp": 2, "ep": 2}),
    "expert-tp": (MOE, {"tp": 2, "etp": 2}),
}
# what is left to the bridge in the second source of each case
LEFT = ("self_attention.linear_qkv.weight", "mlp.experts.linear_fc1.weight", "self_attention.linear_proj.weight")


def bridge_of(shape: Shape, directory: Path) -> Any:
    """The bridge of a checkpoint, building models that need no GPU."""
    own = asdict(shape) | {"max_position_embeddings": 64}
    config = AutoConfig.for_model(own.pop("model_type"), **own)
    if dist.get_rank() == 0:
        config.save_pretrained(directory)
    dist.barrier()
    bridge = AutoBridge.from_config(config, dtype=torch.float32, make_vocab_size_divisible_by=32)
    bridge.set_extra_args(
        use_cpu_initialization=True,
        sequence_parallel=False,
        persist_layer_norm=False,
        moe_token_dispatcher_type="allgather",
        variable_seq_lengths=False,
    )
    bridge._get_transformer_layer_spec = lambda vp_stage=None: as_transformer_engine(
        get_gpt_decoder_block_spec(bridge.config, use_transformer_engine=False, vp_stage=vp_stage)
    )
    bridge.has_vp_stage = True
    return bridge


def main() -> None:
    dist.init_process_group("gloo")
    without_gpus()
    for case, (shape, sizes) in CASES.items():
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=sizes.get("tp", 1),
            pipeline_model_parallel_size=sizes.get("pp", 1),
            expert_model_parallel_size=sizes.get("ep", 1),
            expert_tensor_parallel_size=sizes.get("etp", 1),
        )
        weights = checkpoint(shape)
        directory = OUT / f"{case}-hf"
        directory.mkdir(exist_ok=True)
        if dist.get_rank() == 0:
            save_file(weights, directory / "model.safetensors")
        bridge = bridge_of(shape, directory)
        provide = bridge._model_provider([])
        models = [provide(mpu.is_pipeline_first_stage(), mpu.is_pipeline_last_stage())]
        with torch.no_grad():
            bridge.load_weights(models, str(directory))

        source = MegatronSource(models, bridge=bridge)
        assert not source.gathered
        record_case(case, source, weights)
        with torch.no_grad():
            exported = dict(bridge.export_weights(models))
        assert exported.keys() == weights.keys()
        for name, tensor in weights.items():
            assert torch.equal(exported[name], tensor), name

        rules = {key: rule for key, rule in FAMILIES[shape.model_type].items() if not key.endswith(LEFT)}
        facts = {"model_type": "a family of tomorrow", "vocab_size": shape.vocab_size}
        gathered = MegatronSource(models, facts, rules=rules, bridge=bridge)
        assert any("q_proj.weight" in name for name in gathered.gathered)
        record_case(f"{case}-gathered", gathered, weights)
        again = MegatronSource(models, facts, rules=rules, bridge=bridge)
        assert again.layout() is gathered.layout()
        assert all(torch.equal(again.local(i), gathered.local(i)) for i in range(len(again.layout())))

        # what neither knows is named
        models[0].decoder.layers[0].adapter = torch.nn.Linear(1, 1)
        with pytest.raises(SourceError, match=r"'decoder\.layers\.0\.adapter\.weight' .*Bridge cannot export it"):
            MegatronSource(models, bridge=bridge)
        mpu.destroy_model_parallel()
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
