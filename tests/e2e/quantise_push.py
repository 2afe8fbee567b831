"""A trainer rank of FSDP2 whose shards end within blocks: pushes to engines that serve an fp8 checkpoint.

quantise_push.py CHECKPOINT FP8_CHECKPOINT DAEMON VERSION OUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from weightsync import push_weights
from weightsync.adapters.reference.model import load_checkpoint
from weightsync.errors import WeightSyncError
from weightsync.sources import Fp8


def main() -> None:
    checkpoint, like, daemon, version, out = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model: Any = load_checkpoint(checkpoint)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    up = model.model.layers[0].mlp.up_proj.weight
    told: dict[str, Any] = {}

    def push(case: str, quantise: Fp8) -> None:
        try:
            report = push_weights(model, version=int(version), daemon=daemon, timeout=60, quantise=quantise)
            told[case] = [report.complete, [engine.outcome for engine in report.engines]]
        except WeightSyncError as error:
            told[case] = [type(error).__name__, error.message, error.hint]

    push("alone", Fp8.like(like))
    with torch.no_grad():
        local = up.to_local()
        kept = local[0, 0].clone()
        local[0, 0] = float("nan") if dist.get_rank() == 1 else kept
        push("nan", Fp8.like(like, all_reduce=True))
        local[0, 0] = kept
    push("whole", Fp8.like(like, all_reduce=True))
    Path(out, f"rank{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
