"""A trainer rank on megatron-core: puts a checkpoint into its share of the model, pushes it twice, tells what it heard.

    megatron_push.py CHECKPOINT DAEMON VERSION OUT SIZES

SIZES are JSON: {"tp": 2, "pp": 2, "vp": 2, "ep": 2}. The second push is of other weights: each one more.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from safetensors.torch import load_file

from tests.megatron_kit import Shape, build, load, without_gpus
from weightsync import push_weights
from weightsync.sources import MegatronSource


def main() -> None:
    checkpoint, daemon, version, out, sizes_text = sys.argv[1:]
    sizes = json.loads(sizes_text)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    without_gpus()
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=sizes.get("tp", 1),
        pipeline_model_parallel_size=sizes.get("pp", 1),
        virtual_pipeline_model_parallel_size=sizes.get("vp"),
        expert_model_parallel_size=sizes.get("ep", 1),
        expert_tensor_parallel_size=1,
    )
    facts = json.loads(Path(checkpoint, "config.json").read_text())
    shape = Shape(**{name: facts[name] for name in Shape.__dataclass_fields__ if name in facts})
    models = build(shape)
    load(models, shape, load_file(Path(checkpoint, "model.safetensors")))
    told = []
    for i in range(2):
        report = push_weights(MegatronSource(models, checkpoint), version=int(version) + i, daemon=daemon, timeout=60)
        told.append({**report.as_dict(), "blocked_seconds": 0})
        with torch.no_grad():
            for model in models:
                for parameter in model.parameters():
                    parameter += 1
    Path(out, f"rank{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
