"""A trainer rank on a GPU for test_push.py: shards a checkpoint with FSDP2, pushes it, and writes what it was told."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from weightsync import push_weights
from weightsync.adapters.reference.model import load_checkpoint


class Collectives:
    """All-reduces among the trainer's ranks, in another thread and on another stream, while inside: each rank does
    as many as all others.
    """

    def __init__(self, *, busy: bool) -> None:
        self.done = 0
        self._busy = busy
        self._gpu = torch.cuda.current_device()
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._reduce)

    def __enter__(self) -> Self:
        if self._busy:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._busy:
            self._leave.set()
            self._thread.join()

    def _reduce(self) -> None:
        device = torch.device("cuda", self._gpu)
        torch.cuda.set_device(device)  # of this thread
        with torch.cuda.stream(torch.cuda.Stream()):
            data = torch.ones(2**24, device=device)
            while True:
                left = torch.tensor([float(self._leave.is_set())], device=device)
                dist.all_reduce(left)
                dist.all_reduce(data)
                if float(left) > 0:  # one has left, and all see it
                    return
                self.done += 1


def main() -> None:
    checkpoint, daemons, version, out, pushes, how, name = sys.argv[1:8]
    gpu = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
    torch.cuda.set_device(gpu)
    dist.init_process_group("nccl", device_id=torch.device("cuda", gpu))
    model = load_checkpoint(checkpoint).cuda()
    if how == "float32":  # masters of weights that engines hold in bfloat16
        model = model.float()
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    options: dict[str, Any] = {"dtype": torch.bfloat16} if how == "float32" else {"in_place": how == "in-place"}
    endpoints = daemons.split(",")
    daemon = endpoints[dist.get_rank() * len(endpoints) // dist.get_world_size()]
    told = []
    for i in range(int(pushes)):
        with Collectives(busy=how == "busy") as collectives:
            report = push_weights(model, version=int(version) + i, model=name, daemon=daemon, timeout=120, **options)
        told.append({**report.as_dict(), "blocked_seconds": 0, "collectives": collectives.done})
    Path(out, f"rank{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
