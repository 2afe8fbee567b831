"""Run for test_sources_modules.py: four ranks that write down what they hold of one model, sharded and wrapped in every
way. What they must make up is a plain copy of the model, changed by the same elementwise steps.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffload,
    CPUOffloadPolicy,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel as DDP

from tests.unit.sources_kit import Block, Model, record, record_whole
from weightsync.errors import SourceError
from weightsync.sources import ModuleSource, source_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.device_mesh import DeviceMesh

WORLD = 4
TOKENS = torch.tensor([[1, 2, 3]])


def fsdp1(model: Model, **options: Any) -> nn.Module:
    """Every block a unit, and what is left another."""
    wrap: Callable[[nn.Module], nn.Module] = partial(FSDP1, device_id=torch.device("cpu"), **options)
    for i, layer in enumerate(model.layers):
        model.layers[i] = wrap(layer)
    return wrap(model)


def fsdp2(model: Model, **options: Any) -> nn.Module:
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def head_ignored(shard: Callable[..., nn.Module]) -> Callable[[Model], nn.Module]:
    """By FSDP1, which leaves it as it is."""
    return lambda model: shard(model, ignored_states=[model.head.weight])


def checkpointed(model: Model, wrapper: Callable[[nn.Module], nn.Module] = checkpoint_wrapper) -> Model:
    model.layers = nn.ModuleList(map(wrapper, model.layers))
    return model


def checkpointed_later(model: nn.Module) -> nn.Module:
    """As trainers do it: inside of what FSDP1 has wrapped already."""
    apply_activation_checkpointing(model, check_fn=lambda one: isinstance(one, Block))
    return model


def in_turn(*steps: Callable[[Any], Any]) -> Callable[[Model], nn.Module]:
    """What wraps a model in one thing after another."""

    def wrap(model: Any) -> nn.Module:
        for step in steps:
            model = step(model)
        wrapped: nn.Module = model
        return wrapped

    return wrap


def change(model: nn.Module) -> None:
    """What an optimiser does, but the same for every element wherever it lies."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25).add_(0.5)


class Ranks:
    """This rank's part in all cases."""

    def __init__(self, out: Path, rank: int) -> None:
        self.out, self.rank = out, rank

    def case(
        self,
        name: str,
        shard: Callable[[Model], nn.Module],
        *,
        steps: int = 1,
        backward: bool = True,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> nn.Module:
        """Shard a model, change its weights between some steps, and describe it twice: the same both times."""
        torch.manual_seed(0)
        plain = Model(**options)
        model = shard(copy.deepcopy(plain))
        source_of(model, dtype)
        for _ in range(steps):
            output = model(TOKENS)
            if backward:
                output.float().sum().backward()
                change(model)
                change(plain)
        source, again, anew = source_of(model, dtype), source_of(model, dtype), ModuleSource(model)
        assert source.layout() is again.layout(), name
        assert anew.layout() == source_of(model).layout(), name
        assert set(anew.names or ()) == set(plain.state_dict()), name
        record(self.out, name, self.rank, source)
        if self.rank == 0:
            record_whole(self.out, name, {key: t.to(dtype or t.dtype) for key, t in plain.state_dict().items()})
        return model

    def of_fsdp1(self, hybrid: DeviceMesh) -> None:
        strategies = ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD")
        low = MixedPrecision(param_dtype=torch.bfloat16)
        for original in (True, False):
            kind = "original" if original else "flat"
            for strategy in strategies:
                options: dict[str, Any] = {"use_orig_params": original, "sharding_strategy": ShardingStrategy[strategy]}
                if strategy == "HYBRID_SHARD":
                    options["device_mesh"] = hybrid
                self.case(f"fsdp1-{kind}-{strategy}", partial(fsdp1, **options))
            shard = partial(fsdp1, use_orig_params=original)
            self.case(f"fsdp1-{kind}-untouched", shard, steps=0)
            self.case(f"fsdp1-{kind}-tied", shard, tied=True)
            self.case(f"fsdp1-{kind}-low", partial(shard, mixed_precision=low))
            self.case(f"fsdp1-{kind}-low-sent-low", partial(shard, mixed_precision=low), dtype=torch.bfloat16)
            self.case(f"fsdp1-{kind}-offloaded", partial(shard, cpu_offload=CPUOffload(offload_params=True)), steps=0)
            self.case(f"fsdp1-{kind}-checkpoint", in_turn(checkpointed, shard))
            self.case(f"fsdp1-{kind}-checkpoint-later", in_turn(shard, checkpointed_later))
            gathered = partial(shard, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP)
            self.case(f"fsdp1-{kind}-no-backward", gathered, backward=False)
            self.case(f"fsdp1-{kind}-ignored", head_ignored(shard))
            self.convolutions(original=original)

    def of_others(self, hybrid: DeviceMesh) -> None:
        mesh = init_device_mesh("cpu", (WORLD,))
        low = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        self.case("fsdp2", partial(fsdp2, mesh=mesh))
        self.case("fsdp2-hybrid", partial(fsdp2, mesh=hybrid))
        self.case("fsdp2-low", partial(fsdp2, mesh=mesh, mp_policy=low))
        self.case("fsdp2-offloaded", partial(fsdp2, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False)))
        self.case("fsdp2-uneven", partial(fsdp2, mesh=mesh), width=5, inner=3)
        sharded, original = partial(fsdp2, mesh=mesh), partial(fsdp1, use_orig_params=True)
        self.case("fsdp2-checkpoint", in_turn(checkpointed, sharded))
        self.case("ddp", DDP)
        self.case("ddp-tied", DDP, tied=True)
        self.case("compile", in_turn(torch.compile), steps=0)
        self.case("checkpoint", checkpointed)
        self.case("offload-activations", partial(checkpointed, wrapper=offload_wrapper))
        self.case("checkpoint-compile-ddp", in_turn(checkpointed, torch.compile, DDP), steps=0)
        self.case("ddp-compile", in_turn(DDP, torch.compile), steps=0)
        self.case("checkpoint-fsdp1-compile", in_turn(checkpointed, original, torch.compile), steps=0)
        self.case("checkpoint-fsdp2-compile", in_turn(checkpointed, sharded, torch.compile), steps=0)

    def convolutions(self, *, original: bool) -> None:
        """Parameters that lie in another order of dimensions than they have; and buffers."""
        torch.manual_seed(0)
        plain: Any = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 2, 1))
        plain.to(memory_format=torch.channels_last)
        model = FSDP1(copy.deepcopy(plain), use_orig_params=original, device_id=torch.device("cpu"))
        source = source_of(model, buffers=True)
        assert source.layout() is source_of(model, buffers=True).layout()
        name = f"fsdp1-{'original' if original else 'flat'}-convolutions"
        record(self.out, name, self.rank, source)
        if self.rank == 0:
            record_whole(self.out, name, plain.state_dict())

    def changed(self) -> None:
        """Modules that FSDP1 has flattened, and that have changed places since."""
        pair = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        model = FSDP1(pair, use_orig_params=True, device_id=torch.device("cpu"))
        before = source_of(model).layout()
        pair["a"], pair["b"] = pair["b"], pair["a"]
        assert source_of(model).layout() == ModuleSource(model).layout() != before
        pair["b"] = nn.Linear(4, 4)
        with pytest.raises(SourceError, match="that module is no longer in the one that is pushed"):
            source_of(model)

    def refusals(self) -> None:
        for original in (True, False):
            model = fsdp1(Model(), use_orig_params=original)
            model(TOKENS).sum().backward()
            with FSDP1.summon_full_params(model), pytest.raises(SourceError, match="is gathered by FSDP1"):
                source_of(model)
            with pytest.raises(SourceError, match="stretch of a flat parameter"):
                source_of(dict(model.named_parameters()))
        model = fsdp1(Model(), use_orig_params=True)
        source_of(model)
        held = next(p for p in model.parameters() if p.numel())
        held.data = held.data.clone()
        with pytest.raises(SourceError, match="was given other data than its flat parameter"):
            source_of(model)


def main(rank: int, out: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=WORLD)
    hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    ranks = Ranks(Path(out), rank)
    ranks.of_fsdp1(hybrid)
    ranks.of_others(hybrid)
    ranks.changed()
    ranks.refusals()
    dist.barrier()
    os._exit(0)  # gloo's threads are in nobody's way


if __name__ == "__main__":
    start_processes(main, (sys.argv[1],), nprocs=WORLD, start_method="fork")
