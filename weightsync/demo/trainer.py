"""One FSDP2 trainer rank of the demo; torchrun starts two of them.

Trains the decoder for a few real optimiser steps and pushes after each. After a push, rank 0 compares every engine with
the trainer: the checksum of each tensor-parallel rank's memory, and the greedy continuation of one prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import httpx
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from weightsync import push_weights
from weightsync.adapters.reference.model import CausalLM, greedy, load_checkpoint
from weightsync.adapters.reference.oracle import expected_checksums

PROMPT = (11, 42, 7, 99, 3)
TOKENS = 12


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--daemon", required=True)
    parser.add_argument("--engines", required=True, help="JSON: name → {url, tp}")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--rows", required=True, help="file that gets one JSON line for each step")
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    train(arguments)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # at an ordinary exit torch 2.13's gloo threads sometimes abort the process


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(dist.get_rank())
    torch.set_num_threads(1)
    model = load_checkpoint(arguments.checkpoint)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    engines = json.loads(arguments.engines)
    for step in range(1, arguments.steps + 1):
        tokens = torch.randint(0, model.config.vocab_size, (2, 33))
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        torch.autograd.backward(loss)
        optimiser.step()
        optimiser.zero_grad()

        report = push_weights(model, version=step, daemon=arguments.daemon, timeout=120)

        whole = _whole(model)
        wanted = greedy(model, PROMPT, TOKENS)
        if dist.get_rank() == 0:
            row = {
                "report": report.as_dict(),
                "loss": loss.item(),
                "tokens": wanted,
                "engines": {
                    name: _compare(engine, model.config, whole, wanted, step) for name, engine in engines.items()
                },
            }
            with Path(arguments.rows).open("a") as rows:
                rows.write(json.dumps(row) + "\n")
        dist.barrier()


def _whole(model: CausalLM) -> dict[str, torch.Tensor]:
    """Return every parameter, gathered: a collective. Only the comparison needs it; the push gathers nothing."""
    with torch.no_grad():
        return {name: p.full_tensor() if isinstance(p, DTensor) else p.detach() for name, p in model.named_parameters()}


def _compare(
    engine: dict[str, Any], config: Any, whole: dict[str, torch.Tensor], wanted: list[int], version: int
) -> dict[str, Any]:
    with httpx.Client(base_url=engine["url"], timeout=60, trust_env=False) as client:
        checksums = client.get("/checksums").raise_for_status().json()
        answer = client.post("/generate", json={"prompt_ids": list(PROMPT), "max_tokens": TOKENS})
        generated = answer.raise_for_status().json()
    expected = expected_checksums(config, whole, engine["tp"])
    return {
        "tp": engine["tp"],
        "ranks_equal": sum(a == b for a, b in zip(checksums, expected, strict=True)),
        "tokens": generated["token_ids"],
        "tokens_equal": generated["token_ids"] == wanted,
        "version_equal": generated["weight_version"] == version,
    }


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
