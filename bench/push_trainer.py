"""One trainer rank of bench_push, started with torchrun: a model, pushed again and again. Writes rankN.json."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from bench import shapes
from bench.harness import peak_bytes
from bench.weights import change, shards, whole
from weightsync import push_weights_async


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--daemon", required=True)
    parser.add_argument("--pushes", type=int, required=True)
    parser.add_argument("--first", type=int, default=1, help="version")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = shapes.load(arguments.shape)
    world = dist.get_world_size()
    weights = whole(model) if world == 1 else shards(model, init_device_mesh("cpu", (world,)))
    rows: list[dict[str, Any]] = []
    for version in range(arguments.first, arguments.first + arguments.pushes):
        change(weights)
        dist.barrier()
        start = time.perf_counter()
        push = push_weights_async(weights, version=version, daemon=arguments.daemon, timeout=300)
        push.wait_filled()
        filled = time.perf_counter() - start
        report = push.result().as_dict()
        rows.append(report | {"wall": time.perf_counter() - start, "until_filled": filled})
    found = {"pushes": rows, "peak_bytes": peak_bytes()}
    (arguments.out / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
