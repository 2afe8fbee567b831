"""A trainer rank of a LoRA fine-tune under FSDP2: pushes, and writes what it was told and what engines should hold.

lora_push.py CHECKPOINT DAEMON VERSION OUT
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard

from weightsync import push_lora, push_weights
from weightsync.errors import PushAborted, WeightSyncError
from weightsync.sources import LoraSource

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM


def main() -> None:
    checkpoint, daemon, version, out = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    # as two ways of training shard it: the base model alone, with the adapter on each rank, or all parameters
    kept, cut = _adapted(checkpoint, 0), _adapted(checkpoint, 1)
    _shard(kept, {parameter for name, parameter in kept.named_parameters() if "lora_" in name})
    _shard(cut, set())
    told: dict[str, Any] = {}
    try:
        push_weights(cut, version=int(version), daemon=daemon, timeout=60)
    except PushAborted as error:  # all hear of the first
        told["refused"] = [error.message, error.hint]
    reports = [push_weights(kept, version=int(version), daemon=daemon, timeout=60)]
    for i in (1, 2):
        with torch.no_grad():
            for name, parameter in cut.named_parameters():
                if "lora_B" in name:
                    parameter += 0.1
        source = LoraSource(cut, gather=True)
        reports.append(push_weights(source, version=int(version) + i, daemon=daemon, timeout=60))
    told["complete"] = [report.complete for report in reports]
    told["alone"] = [_alone(cut, daemon, gather=gather) for gather in (False, True)]
    rank = dist.get_rank()
    Path(out, f"rank{rank}.json").write_text(json.dumps(told))
    whole = {name: _gathered(rows) for name, rows in _merged_rows(cut).items()}
    if not rank:
        save_file(whole, Path(out, "merged.safetensors"))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def _alone(model: Any, daemon: str, *, gather: bool) -> str:
    try:
        return str(push_lora(model, version=1, daemon=daemon, gather=gather))
    except WeightSyncError as error:
        return str(error.message)


def _adapted(checkpoint: str, seed: int) -> Any:
    torch.manual_seed(seed)  # the same adapter on all ranks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        targets = ["q_proj", "o_proj", "down_proj", "lm_head"]
        # of one type: a group of FSDP2 has one
        model = get_peft_model(
            model, LoraConfig(r=3, lora_alpha=2, target_modules=targets), autocast_adapter_dtype=False
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model


def _shard(model: Any, ignored: set[torch.nn.Parameter]) -> None:
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, ignored_params=ignored)
    fully_shard(model, ignored_params=ignored)


def _merged_rows(model: Any) -> dict[str, torch.Tensor]:
    """This rank's rows of each tensor, merged by hand, as peft does on a CPU, with what torch itself gathers."""
    size, rank = dist.get_world_size(), dist.get_rank()
    rows = {}
    with torch.no_grad():
        for name, parameter in model.base_model.model.named_parameters():
            if "lora_" in name:
                continue
            mine = parameter.to_local().clone()
            path, _, last = name.rpartition(".base_layer.")
            if path:
                layer = model.base_model.model.get_submodule(path)
                a, b = (of["default"].weight.full_tensor().float() for of in (layer.lora_A, layer.lora_B))
                mine += ((torch.chunk(b, size)[rank] @ a) * layer.scaling["default"]).to(mine.dtype)
            rows[f"{path}.{last}" if path else name] = mine
    return rows


def _gathered(rows: torch.Tensor) -> torch.Tensor:
    """All ranks' rows."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, rows)
    return torch.cat(found)


if __name__ == "__main__":
    main()
