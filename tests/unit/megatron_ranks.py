"""Run by torchrun for test_sources_megatron.py: real Megatron ranks that write down what their sources say and hold."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import shard_buffer

from tests.megatron_kit import Shape, build, checkpoint, load, without_gpus
from tests.unit.sources_kit import record, record_whole
from weightsync.sources import MegatronSource

OUT = Path(sys.argv[1])

QWEN2 = Shape("qwen2", attention_bias=True)
QWEN3 = Shape("qwen3")
TIED = Shape("qwen2", attention_bias=True, tie_word_embeddings=True)
MOE = Shape("qwen3_moe", num_experts=4)
DEEP = Shape("llama", num_hidden_layers=8)

# case: model, how it is cut, how it is built
CASES: dict[int, dict[str, tuple[Shape, dict[str, int], dict[str, Any]]]] = {
    1: {"one": (QWEN3, {}, {})},
    2: {
        "tp2": (QWEN2, {"tp": 2}, {}),
        "tp2-te": (QWEN3, {"tp": 2}, {"like_te": True}),
        "tp2-tied": (TIED, {"tp": 2}, {}),
        "tp2-bfloat16": (QWEN3, {"tp": 2}, {"dtype": torch.bfloat16}),
        "pp2": (QWEN3, {"pp": 2}, {}),
        "pp2-tied": (TIED, {"pp": 2}, {}),
        "pp2-uneven": (Shape("llama", num_hidden_layers=3), {"pp": 2}, {"num_layers_in_first_pipeline_stage": 1}),
        "vpp2": (DEEP, {"pp": 2, "vp": 2}, {}),
        "dp2": (QWEN2, {}, {}),
        "cp2": (QWEN2, {"cp": 2}, {}),
        "tp2-ep2": (MOE, {"tp": 2, "ep": 2}, {}),
        "tp2-ep2-te": (MOE, {"tp": 2, "ep": 2}, {"like_te": True}),
        "tp2-etp2": (MOE, {"tp": 2, "etp": 2}, {}),
        "tp2-etp2-te": (MOE, {"tp": 2, "etp": 2}, {"like_te": True}),
        "tp2-etp2-packed": (MOE, {"tp": 2, "etp": 2}, {"moe_grouped_gemm": True}),
        "ep2-mixtral": (Shape("mixtral", num_experts=4), {"ep": 2}, {}),
        "tp2-shared-expert": (
            Shape("qwen2_moe", num_experts=2, shared_expert_intermediate_size=16, attention_bias=True, dense_layers=1),
            {"tp": 2, "ep": 2},
            {},
        ),
    },
    4: {
        "tp2-pp2": (QWEN3, {"tp": 2, "pp": 2}, {}),
        "tp2-pp2-tied": (TIED, {"tp": 2, "pp": 2}, {}),
        "tp2-vpp2": (DEEP, {"tp": 2, "pp": 2, "vp": 2}, {"like_te": True}),
        "tp4-few-groups": (Shape("qwen2", num_key_value_heads=2, attention_bias=True), {"tp": 4}, {}),
        "tp4-padding-alone": (Shape("qwen2", vocab_size=33), {"tp": 4}, {}),  # two ranks have nothing but padding
        "tp2-ep2-etp2": (MOE, {"tp": 2, "ep": 2, "etp": 2}, {"like_te": True}),
        "tp2-pp2-ep2": (Shape("qwen3_moe", num_hidden_layers=4, num_experts=4), {"tp": 2, "pp": 2, "ep": 2}, {}),
    },
}


def record_case(case: str, source: MegatronSource, whole: dict[str, torch.Tensor]) -> None:
    """Write this rank's layout and shards; rank 0 also writes the checkpoint."""
    record(OUT, case, dist.get_rank(), source)
    if dist.get_rank() == 0:
        record_whole(OUT, case, whole)


def described_again(models: list[Any], shape: Shape, before: MegatronSource) -> None:
    """After all parameters have moved: the same layout, and the memory where it is now."""
    for model in models:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone() + 1
    after = MegatronSource(models, shape.facts())
    assert after.layout() is before.layout(), "it was described anew"
    for i in range(len(after.layout())):
        one, other = before.local(i), after.local(i)
        assert one.shape == other.shape == after.layout().shard(i).shape
        assert one.stride() == other.stride()
        assert torch.equal(one + 1, other)
    for model in models:
        for parameter in model.parameters():
            parameter.data = parameter.data - 1


def behind_a_distributed_optimizer(shape: Shape) -> None:
    """Megatron's DDP moves all parameters into buffers; after a step each rank has its own share of what is new."""
    weights = checkpoint(shape)
    models = build(shape)
    load(models, shape, weights)
    before = MegatronSource(models, shape.facts())
    options = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_param_gather=True)
    wrapped = DistributedDataParallel(models[0].config, options, models[0])
    source = MegatronSource(wrapped, shape.facts())
    assert source.layout() is before.layout()
    record_case("ddp", source, weights)
    for group in wrapped.bucket_groups:
        for bucket in group.buckets:  # as `DistributedOptimizer` does; it needs GPUs
            shard_buffer(bucket.param_data, dist.get_world_size())[dist.get_rank()].add_(1)
    record_case("ddp-stepped", MegatronSource(wrapped, shape.facts()), {name: one + 1 for name, one in weights.items()})


def main() -> None:
    dist.init_process_group("gloo")
    without_gpus()
    for case, (shape, sizes, options) in CASES[dist.get_world_size()].items():
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=sizes.get("tp", 1),
            pipeline_model_parallel_size=sizes.get("pp", 1),
            virtual_pipeline_model_parallel_size=sizes.get("vp"),
            context_parallel_size=sizes.get("cp", 1),
            expert_model_parallel_size=sizes.get("ep", 1),
            expert_tensor_parallel_size=sizes.get("etp", 1),
        )
        weights = checkpoint(shape, options.get("dtype", torch.float32))
        models = build(shape, **options)
        load(models, shape, weights)
        source = MegatronSource(models if len(models) > 1 else models[0], shape.facts())
        assert not source.gathered
        record_case(case, source, weights)
        if options.get("dtype") is None:
            described_again(models, shape, source)
        if case == "dp2":
            behind_a_distributed_optimizer(shape)
        mpu.destroy_model_parallel()
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # torch 2.13's gloo threads now and then abort a process that ends the ordinary way


if __name__ == "__main__":
    main()
