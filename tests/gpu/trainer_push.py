"""A trainer rank for test_trainers.py: takes two real steps with a model sharded in one way, and pushes after each.

    trainer_push.py DEVICE CHECKPOINT DAEMON VERSION OUT CASE [FP8_CHECKPOINT]

CASE is one of CASES, as JSON. Rank 0 then writes the whole model, as torch itself gathers it.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffload, CPUOffloadPolicy, MixedPrecision, ShardingStrategy, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

from tests.gpu.ranks import dawdle, join, leave, tell, told_of
from weightsync import push_weights
from weightsync.adapters.reference.model import load_checkpoint
from weightsync.errors import PushAborted
from weightsync.sources import Fp8

if TYPE_CHECKING:
    from collections.abc import Callable

TOKENS = [[5, 17, 211, 3, 90], [1, 2, 3, 4, 5]]
WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")


class Case(NamedTuple):
    """How a model is sharded, and what it is held and sent as."""

    shard: Callable[[Any, torch.device], nn.Module]
    ranks: int = 2
    masters: bool = False  # held in float32, sent as bfloat16


def fsdp1(model: Any, device: torch.device, **options: Any) -> nn.Module:
    """Every layer a unit, in the wrapper of activations' checkpoints."""
    chosen: dict[str, Any] = {"use_orig_params": True, "device_id": device} | options
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = FSDP1(checkpoint_wrapper(layer), **chosen)
    return FSDP1(model, **chosen)


def fsdp1_hybrid(model: Any, device: torch.device) -> nn.Module:
    mesh = init_device_mesh(device.type, (2, 2), mesh_dim_names=("replicas", "shards"))
    return fsdp1(model, device, sharding_strategy=ShardingStrategy.HYBRID_SHARD, device_mesh=mesh)


def fsdp1_low(model: Any, device: torch.device) -> nn.Module:
    return fsdp1(model, device, mixed_precision=MixedPrecision(param_dtype=torch.bfloat16))


def fsdp2(model: Any, device: torch.device, sizes: tuple[int, ...] = (), **options: Any) -> nn.Module:
    names = ("replicas", "shards")[-len(sizes or (1,)) :]
    mesh = init_device_mesh(device.type, sizes or (dist.get_world_size(),), mesh_dim_names=names)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    whole: nn.Module = model
    return whole


def fsdp2_offloaded(model: Any, device: torch.device) -> nn.Module:
    return fsdp2(model, device, offload_policy=CPUOffloadPolicy(pin_memory=device.type == "cuda"))


def ddp(model: nn.Module, device: torch.device) -> nn.Module:
    return DDP(model, device_ids=[device] if device.type == "cuda" else None)


def compiled(model: nn.Module) -> nn.Module:
    """By torch.compile, all but the kernels: making those takes longer than all else here."""
    made: Any = torch.compile(model, backend="eager")
    whole: nn.Module = made
    return whole


CASES = {
    "fsdp1": Case(fsdp1),
    "fsdp1-flat": Case(lambda model, device: fsdp1(model, device, use_orig_params=False)),
    "fsdp1-masters": Case(fsdp1_low, masters=True),
    "fsdp1-offloaded": Case(lambda model, device: fsdp1(model, device, cpu_offload=CPUOffload(offload_params=True))),
    "fsdp1-compiled": Case(lambda model, device: compiled(fsdp1(model, device))),
    "fsdp1-hybrid": Case(fsdp1_hybrid, ranks=4),
    "fsdp2-offloaded": Case(fsdp2_offloaded),
    "fsdp2-offloaded-masters": Case(fsdp2_offloaded, masters=True),
    "fsdp2-hybrid": Case(lambda model, device: fsdp2(model, device, (2, 2)), ranks=4),
    "ddp": Case(ddp),
    "ddp-compiled": Case(lambda model, device: compiled(ddp(model, device))),
    "fsdp2": Case(fsdp2),
}


def step(model: nn.Module, optimiser: torch.optim.Optimizer, device: torch.device) -> None:
    """A step of the optimiser, on a GPU one that is not over when this returns."""
    loss = model(torch.tensor(TOKENS, device=device)).logsumexp(-1).mean()
    loss.backward()
    dawdle(device)
    optimiser.step()
    optimiser.zero_grad()


def gathered(model: nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
    """The whole of each parameter, by what torch has for that. A collective."""
    with FSDP1.summon_full_params(model, writeback=False), torch.no_grad():
        found = {}
        for name, parameter in model.named_parameters():
            for wrapper in WRAPPERS:
                name = name.replace(wrapper, "")
            whole: torch.Tensor = parameter
            if isinstance(parameter, DTensor):
                part: Any = parameter.to(device)
                whole = part.full_tensor()
            found[name.removeprefix("module.")] = whole.detach().cpu().clone()
    return found


def main() -> None:
    kind, checkpoint, daemon, version, out, name, *fp8 = sys.argv[1:]
    warnings.simplefilter("ignore")
    device = join(kind)
    case = CASES[json.loads(name)]
    model: nn.Module = load_checkpoint(checkpoint).to(device)
    model = case.shard(model.float() if case.masters else model, device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.02)
    quantise = Fp8.like(fp8[0], all_reduce=True) if fp8 else None
    if fp8:
        with pytest.raises(PushAborted, match="lie on several ranks"):
            push_weights(model, version=int(version), daemon=daemon, timeout=60, quantise=fp8[0])
    dtype = "bfloat16" if case.masters else None
    told = []
    for i in range(2):
        step(model, optimiser, device)
        number = int(version) + i
        report = push_weights(model, version=number, daemon=daemon, timeout=60, dtype=dtype, quantise=quantise)
        told.append(told_of(report))
    whole = gathered(model, device)
    if dist.get_rank() == 0:
        save_file(whole, Path(out, "whole.safetensors"))
    tell(out, told)
    leave()


if __name__ == "__main__":
    main()
