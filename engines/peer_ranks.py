"""Shared by the trainer ranks of all peers: a rank on each GPU, and FSDP2 shards as bench/gpu_trainer.py makes them.

Weights change before each push. A push's time begins when all ranks have come to it, and ends when the last rank's push
has returned, as rank 0 sees it. Every rank writes rankN.json, with rows of the same form as gpu_trainer's. Nothing is
compared with the weights that were sent. Without GPUs the ranks meet over gloo, so that a script can be tried.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from bench.gpu_trainer import change, shards

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


def options(about: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with config.json")
    parser.add_argument("--kind", required=True, help="of the server: sglang, vllm or reference")
    parser.add_argument("--url", required=True, help="of the server")
    parser.add_argument("--pushes", type=int, required=True)
    parser.add_argument("--first", type=int, default=1, help="version")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def start(model: str) -> dict[str, torch.Tensor]:
    """Join the other ranks. Returns this rank's shards."""
    if torch.cuda.is_available():
        gpu = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(gpu)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", gpu))
    else:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    return shards(model, init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),)))


def run(
    arguments: argparse.Namespace,
    weights: dict[str, torch.Tensor],
    push: Callable[[int], dict[str, float]],
    *,
    software: str,
    settings: str,
    before: dict[str, float] | None = None,
    after: Callable[[int], object] | None = None,
    held: Sequence[str] = (),
) -> None:
    """Make all pushes, and end this process.

    `push(version)` returns the seconds of its phases. `held` names the phases within which weights may not change.
    `before` has the seconds of work that was done once for all pushes and is not in their time. If `held` is empty, the
    trainer is held up during that work only, or without `before` for the whole push. `after(version)` checks a push.
    """
    rows = []
    for version in range(arguments.first, arguments.first + arguments.pushes):
        change(weights)
        synchronize()
        dist.barrier()
        began = time.perf_counter()
        phases = push(version)
        dist.barrier()
        seconds = time.perf_counter() - began
        if after:
            after(version)
        rows.append(
            {
                "version": version,
                "bytes": sum(tensor.numel() * tensor.element_size() for tensor in weights.values()),
                "tensors": len(weights),
                "phases": phases,
                "complete": True,
                "wall_seconds": seconds,
                "until_filled_seconds": until_filled(before, [phases[name] for name in held], seconds),
            }
        )
        if dist.get_rank() == 0:
            each = {name: round(took * 1e3, 1) for name, took in phases.items()}
            print(f"push {version}: {seconds:.4f} s, {each}", flush=True)
    found: dict[str, Any] = {"pushes": rows, "before": before or {}, "software": software, "settings": settings}
    if torch.cuda.is_available():
        found["peak"] = torch.cuda.max_memory_allocated()
    (arguments.out / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of a library could still make a rank fail that has done its work


def until_filled(before: Mapping[str, float] | None, held: Sequence[float], seconds: float) -> float:
    """Return the seconds that a push holds a trainer up."""
    if held:
        return sum(held)
    return sum(before.values()) if before else seconds


def whole(weights: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor, whole, on every rank. Each is gathered when it is asked for."""
    with torch.no_grad():
        for name, tensor in weights.items():
            yield name, tensor.full_tensor()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
