"""A trainer rank on megatron-core for test_megatron.py: puts a checkpoint into its share of the model, pushes it twice.

    megatron_push.py DEVICE CHECKPOINT DAEMON VERSION OUT CASE

CASE is JSON: sizes such as {"tp": 2, "pp": 2, "ep": 2, "etp": 2}; "like_te", experts and norms kept as Transformer
Engine's layers do; "masters", parameters in float32, sent as bfloat16; "optimiser", Megatron's own. The second push is
of other weights: each one more, or one step of the optimiser on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from safetensors.torch import load_file

from tests.gpu.ranks import dawdle, join, leave, tell, told_of
from tests.megatron_kit import Shape, build, load, without_gpus
from weightsync import push_weights
from weightsync.sources import MegatronSource

LR = 0.125


class Stepping:
    """The model behind Megatron's DDP and its distributed optimizer, which keeps float32 masters of each rank's share.

    Every gradient is one, so that all elements take the same step wherever they lie.
    """

    def __init__(self, model: Any) -> None:
        options = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_param_gather=False)
        self.model = DistributedDataParallel(model.config, options, model)
        config = OptimizerConfig(
            optimizer="adam",
            lr=LR,
            min_lr=LR,
            weight_decay=0.0,
            clip_grad=0.0,
            bf16=True,
            use_distributed_optimizer=True,
        )
        self.optimiser = get_megatron_optimizer(config, [self.model], use_gloo_process_groups=False)

    def step(self) -> None:
        self.model.zero_grad_buffer()
        self.optimiser.zero_grad()
        for parameter in self.model.parameters():
            parameter.main_grad.fill_(1.0)
        self.model.finish_grad_sync()
        done, *_ = self.optimiser.step()
        assert done


def main() -> None:
    kind, checkpoint, daemon, version, out, text = sys.argv[1:]
    case = json.loads(text)
    device = join(kind)
    if device.type == "cpu":
        without_gpus()
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=case.get("tp", 1),
        pipeline_model_parallel_size=case.get("pp", 1),
        virtual_pipeline_model_parallel_size=case.get("vp"),
        expert_model_parallel_size=case.get("ep", 1),
        expert_tensor_parallel_size=case.get("etp", 1),
        create_gloo_process_groups=False,
    )
    facts = json.loads(Path(checkpoint, "config.json").read_text())
    shape = Shape(**{name: facts[name] for name in Shape.__dataclass_fields__ if name in facts})
    dtype = torch.float32 if case.get("masters") else torch.bfloat16
    models = [one.to(device) for one in build(shape, like_te=case.get("like_te", False), dtype=dtype)]
    load(models, shape, load_file(Path(checkpoint, "model.safetensors")))
    stepping = Stepping(models[0]) if case.get("optimiser") else None
    pushed: Any = models if stepping is None else stepping.model
    told = []
    for i in range(2):
        report = push_weights(
            MegatronSource(pushed, checkpoint),
            version=int(version) + i,
            daemon=daemon,
            timeout=60,
            dtype="bfloat16" if case.get("masters") else None,
        )
        told.append(told_of(report))
        dawdle(device)
        if stepping is not None:
            stepping.step()
            continue
        with torch.no_grad():
            for model in models:
                for parameter in model.parameters():
                    assert parameter.device == device
                    parameter += 1
    tell(out, told)
    leave()


if __name__ == "__main__":
    main()
