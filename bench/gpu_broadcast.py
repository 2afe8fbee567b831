"""Measures NCCL broadcasts of torch.distributed between the GPUs that a push between nodes connects.

Rank i of the first half sends to rank i of the second, all pairs at once. `broadcasts` starts it with torchrun; rank 0
writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from weightsync.adapters.reference.config import read_config
from weightsync.adapters.reference.sharding import checkpoint_tensors
from weightsync.fleet import FleetError

if TYPE_CHECKING:
    from weightsync.fleet import Fleet

RUNS = 5
WAIT = 120.0  # seconds, for all of it


def broadcasts(fleet: Fleet, model: Path, bucket: int, gpus: int) -> dict[str, float]:
    """Return GB/s between each pair of GPUs, in buckets of `bucket` bytes and tensor by tensor. Raises `FleetError`."""
    out = fleet.root / "broadcasts.json"
    options = ["--model", str(model), "--bucket", str(bucket), "--out", str(out)]
    plain = fleet.torchrun("broadcasts", __file__, gpus, options)
    if plain.wait(WAIT):
        raise FleetError(plain.tail(60))
    found: dict[str, float] = json.loads(out.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--bucket", type=int, required=True, help="bytes")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rank, gpu = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(gpu)
    dist.init_process_group("nccl", device_id=torch.device("cuda", gpu))
    pairs = dist.get_world_size() // 2
    groups = [dist.new_group([i, pairs + i]) for i in range(pairs)]
    group, root = groups[rank % pairs], rank % pairs
    bucket = torch.empty(arguments.bucket, dtype=torch.uint8, device="cuda")
    config = read_config(arguments.model)
    sizes = [-(-shape.numel() // pairs) for shape in map(torch.Size, checkpoint_tensors(config).values())]
    room = torch.empty(sum(sizes), dtype=getattr(torch, config.dtype), device="cuda")
    tensors = room.split(sizes)

    def seconds(tensors: list[torch.Tensor]) -> float:
        found = []
        for _ in range(RUNS + 1):
            torch.cuda.synchronize()
            dist.barrier()
            start = time.perf_counter()
            for tensor in tensors:
                dist.broadcast(tensor, root, group=group)
            torch.cuda.synchronize()
            found.append(time.perf_counter() - start)
        slowest = torch.tensor(statistics.median(found[1:]), device="cuda")
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return float(slowest)

    several = 8
    figures = {
        "NCCL broadcast, buckets": several * arguments.bucket / seconds([bucket] * several) / 1e9,
        "NCCL broadcast, tensor by tensor": room.nbytes / seconds(list(tensors)) / 1e9,
    }
    if rank == 0:
        arguments.out.write_text(json.dumps(figures))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
