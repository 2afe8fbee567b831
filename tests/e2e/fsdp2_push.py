"""A trainer rank: shards a checkpoint with FSDP2, pushes it twice, and writes what it was told.

    fsdp2_push.py CHECKPOINT DAEMONS VERSION OUT [MESH]

DAEMONS are one, or several with commas between, each that of as many ranks. MESH is "2x2" for HSDP: replicas x shards.
"""

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
    checkpoint, daemons, version, out, *mesh_shape = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = load_checkpoint(checkpoint)
    world, endpoints = dist.get_world_size(), daemons.split(",")
    daemon = endpoints[dist.get_rank() * len(endpoints) // world]
    dims = tuple(map(int, mesh_shape[0].split("x"))) if mesh_shape else (world,)
    mesh = init_device_mesh("cpu", dims, mesh_dim_names=("replicas", "shards")[-len(dims) :])
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    reports = [push_weights(model, version=int(version) + i, daemon=daemon, timeout=60) for i in range(2)]
    told = [{**r.as_dict(), "blocked_seconds": 0} for r in reports]
    Path(out, f"rank{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
