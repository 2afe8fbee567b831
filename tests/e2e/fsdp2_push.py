"""A trainer rank: shards a checkpoint with FSDP2, pushes it twice, and writes what it was told.

    fsdp2_push.py CHECKPOINT DAEMONS VERSION OUT [MESH [in-place]]

DAEMONS are one, or several with commas between, each that of as many ranks. MESH is "2x2" for HSDP: replicas x shards.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from weightsync import push_weights
from weightsync.adapters.reference.model import load_checkpoint


def main() -> None:
    checkpoint, daemons, version, out, *more = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = load_checkpoint(checkpoint)
    world, endpoints = dist.get_world_size(), daemons.split(",")
    daemon = endpoints[dist.get_rank() * len(endpoints) // world]
    dims = tuple(map(int, more[0].split("x"))) if more else (world,)
    mesh = init_device_mesh("cpu", dims, mesh_dim_names=("replicas", "shards")[-len(dims) :])
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    options: dict[str, Any] = {"daemon": daemon, "timeout": 60, "in_place": "in-place" in more}
    reports = [push_weights(model, version=int(version) + i, **options) for i in range(2)]
    told = [{**r.as_dict(), "blocked_seconds": 0} for r in reports]
    Path(out, f"rank{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
