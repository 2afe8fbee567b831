"""What scripts of trainer ranks in this folder have in common: how they begin, tell what they heard, and end."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from weightsync import PushReport

__all__ = ["dawdle", "join", "leave", "tell", "told_of"]


def join(kind: str) -> torch.device:
    """Meet the other ranks: over NCCL, each on a GPU of its own, or over gloo on the CPU."""
    torch.set_num_threads(1)
    if kind == "cpu":
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    return device


def dawdle(device: torch.device) -> None:
    """Keep a GPU busy for a tenth of a second: what is asked of it next is not over when a push begins."""
    if device.type == "cuda":
        torch.cuda._sleep(200_000_000)


def told_of(report: PushReport) -> dict[str, Any]:
    """A report without what each rank has of its own."""
    return {**report.as_dict(), "blocked_seconds": 0}


def tell(out: str, told: list[dict[str, Any]]) -> None:
    Path(out, f"rank{dist.get_rank()}.json").write_text(json.dumps(told))


def leave() -> None:
    """End without the interpreter's shutdown, in which gloo's threads now and then abort a process."""
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
