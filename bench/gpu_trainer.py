"""One trainer rank of bench_gpu: random shards of a model's shapes, as FSDP2 lays them out, pushed again and again."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from weightsync import push_weights_async
from weightsync.adapters.reference.config import read_config
from weightsync.adapters.reference.sharding import checkpoint_tensors


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--daemon", required=True)
    parser.add_argument("--pushes", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--in-place", action="store_true")
    arguments = parser.parse_args()
    gpu = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(gpu)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", gpu))
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    weights = shards(arguments.model, mesh)
    rows = []
    for version in range(arguments.first, arguments.first + arguments.pushes):
        change(weights)
        torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        options = {"daemon": arguments.daemon, "in_place": arguments.in_place, "timeout": 300}
        push = push_weights_async(weights, version=version, **options)
        push.wait_filled()
        filled = time.perf_counter() - start
        report = push.result()
        rows.append({**report.as_dict(), "wall_seconds": time.perf_counter() - start, "until_filled_seconds": filled})
        if dist.get_rank() == 0:
            one = rows[-1]
            phases = {name: round(seconds * 1e3, 1) for name, seconds in one["phases"].items()}
            print(f"push {version}: {one['wall_seconds']:.4f} s, filled {filled:.4f} s, {phases}", flush=True)
    stats = {
        "allocated": torch.cuda.memory_allocated(),
        "peak": torch.cuda.max_memory_allocated(),
        "blocked_median": statistics.median(row["blocked_seconds"] for row in rows),
    }
    arguments.out.joinpath(f"rank{dist.get_rank()}.json").write_text(json.dumps({"pushes": rows, **stats}))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def shards(model: str, mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """Return this rank's part of every tensor, random: dimension 0 is cut into chunks, as FSDP2 does."""
    config = read_config(model)
    dtype = getattr(torch, config.dtype)
    rank, world = dist.get_rank(), dist.get_world_size()
    weights: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, shape in checkpoint_tensors(config).items():
            chunk = -(-shape[0] // world)
            rows = max(0, min(shape[0], (rank + 1) * chunk) - rank * chunk)
            local = torch.empty((rows, *shape[1:]), dtype=dtype, device=mesh.device_type)
            if local.numel():
                local.view(torch.int16).random_(-(2**15), 2**15)
            stride = [1] * len(shape)
            for d in range(len(shape) - 2, -1, -1):
                stride[d] = stride[d + 1] * shape[d + 1]
            weights[name] = DTensor.from_local(
                local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=tuple(stride)
            )
    return weights


def change(weights: dict[str, torch.Tensor]) -> None:
    """Change some tensors' values in place: enough to notice a push that did nothing."""
    with torch.no_grad():
        for tensor in list(weights.values())[:50]:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if local.numel():
                local.view(torch.int16).add_(1)


if __name__ == "__main__":
    main()
