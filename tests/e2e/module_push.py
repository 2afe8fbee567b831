"""Four trainer ranks, forked from one process, that push one model sharded and wrapped in several ways. After each push
rank 0 writes down what every engine holds.

    module_push.py CHECKPOINT_A CHECKPOINT_B DAEMON VERSION OUT ENGINE_URL...
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import MixedPrecision, ShardingStrategy, fully_shard
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel as DDP

from weightsync import push_weights
from weightsync.adapters.reference.model import load_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

WORLD = 4


def flattened(model: Any, **options: Any) -> nn.Module:
    """By FSDP1, every layer a unit, in the wrapper of activations' checkpoints and in torch.compile's."""
    wrap: Callable[[nn.Module], nn.Module] = partial(FSDP1, device_id=torch.device("cpu"), **options)
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = wrap(checkpoint_wrapper(layer))
    compiled: Any = torch.compile(wrap(model))
    whole: nn.Module = compiled
    return whole


def main(rank: int, arguments: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    first, second, daemon, version, out, *engines = arguments
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=WORLD)
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    held: dict[str, Any] = {}

    def push(case: str, model: nn.Module, **how: Any) -> None:
        report = push_weights(model, version=int(version) + len(held), daemon=daemon, timeout=60, **how)
        held[case] = {}
        if rank == 0:
            answers = [httpx.get(f"{e}/checksums", timeout=30, trust_env=False).raise_for_status() for e in engines]
            held[case] = {"complete": report.complete, "sums": [answer.json() for answer in answers]}

    masters = load_checkpoint(second).double()  # wider than what the engines serve
    low = MixedPrecision(param_dtype=torch.float32)
    push("masters", flattened(masters, use_orig_params=True, mixed_precision=low), dtype=torch.float32)
    hybrid = {"sharding_strategy": ShardingStrategy.HYBRID_SHARD, "device_mesh": both}
    push("flat hybrid", flattened(load_checkpoint(first), **hybrid))
    model = load_checkpoint(second)
    for layer in model.model.layers:
        fully_shard(layer, mesh=both)
    fully_shard(model, mesh=both)
    push("fsdp2 hybrid", model)
    policy = nn.ModuleDict({"policy": DDP(load_checkpoint(first)), "value": nn.Linear(2, 1)})
    push("some", policy, only="policy.model.layers.0.*", rename=lambda name: name.removeprefix("policy."))
    if rank == 0:
        Path(out, "held.json").write_text(json.dumps(held))
    dist.barrier()
    os._exit(0)  # gloo's threads are in nobody's way


if __name__ == "__main__":
    start_processes(main, (sys.argv[1:],), nprocs=WORLD, start_method="fork")
