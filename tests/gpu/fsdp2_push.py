"""A trainer rank on a GPU for test_push.py: shards a checkpoint with FSDP2, pushes it, and writes what it was told."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from weightsync import push_weights
from weightsync.adapters.reference.model import load_checkpoint


def main() -> None:
    checkpoint, daemon, version, out, pushes, master, name = sys.argv[1:8]
    gpu = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
    torch.cuda.set_device(gpu)
    dist.init_process_group("nccl", device_id=torch.device("cuda", gpu))
    model = load_checkpoint(checkpoint).cuda()
    if master:  # float32 masters of weights that engines hold in bfloat16
        model = model.float()
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    dtype = torch.bfloat16 if master else None
    told = []
    for i in range(int(pushes)):
        report = push_weights(model, version=int(version) + i, model=name, daemon=daemon, timeout=120, dtype=dtype)
        told.append({**report.as_dict(), "blocked_seconds": 0})
    Path(out, f"rank{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
