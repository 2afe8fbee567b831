"""An actor rank of verl: integrations_verl_ranks.py CHECKPOINT DAEMON OUT."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from verl.checkpoint_engine.base import CheckpointEngineRegistry

import weightsync.integrations.verl  # noqa: F401 - registers it


def main() -> None:
    checkpoint, daemon, out = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    weights = load_file(f"{checkpoint}/model.safetensors")
    engine = CheckpointEngineRegistry.new("weightsync", bucket_size=1 << 20, daemon=daemon, timeout=60)

    def whole():
        """As verl's FSDP engine makes them: each is a collective of all ranks."""
        for name, tensor in weights.items():
            dist.barrier()
            yield name, tensor.clone()

    told = asyncio.run(engine.send_weights(whole(), global_steps=1))
    Path(out, f"rank{dist.get_rank()}.json").write_text(json.dumps({**told, "weightsync/seconds": 0}))
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
