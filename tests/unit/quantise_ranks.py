"""Run by torchrun for test_sources_quantised.py: real ranks of FSDP2 and FSDP1 that write down what they send."""

from __future__ import annotations

import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import fully_shard

from tests.quantise_kit import quantised_whole
from tests.unit import sources_kit
from tests.unit.sources_kit import Model
from weightsync.errors import PushAborted, SourceError
from weightsync.sources import Fp8, Part, PartSource, source_of
from weightsync.sources.quantised import QuantisedSource, quantised
from weightsync.sources.undescribed import Undescribed

OUT = Path(sys.argv[1])
KEEP = ("*embed*", "head")


def measured(weights: Any, recipe: Fp8, group: Any = None) -> QuantisedSource:
    source = quantised(source_of(weights), recipe, group)
    assert isinstance(source, QuantisedSource)
    source.measure()
    return source


def record(case: str, weights: Any, recipe: Fp8, whole: dict[str, torch.Tensor], group: Any = None) -> None:
    """Write what this rank sends of `weights`, and what all must make up."""
    sources_kit.record(OUT, case, dist.get_rank(), measured(weights, recipe, group))
    if dist.get_rank() == 0:
        names = [name for name, tensor in whole.items() if tensor.dim() == 2 and recipe.quantises([name], (1, 1))]
        assert names
        sources_kit.record_whole(OUT, case, quantised_whole(whole, names, recipe.block))


class Unreadable(PartSource):
    """Weights that cannot be read."""

    error: Exception

    def local(self, shard: int) -> torch.Tensor:
        raise self.error


def ranks_that_fail(recipe: Fp8) -> None:
    """All hear of them in the collective: nobody waits for its timeout."""
    rank = dist.get_rank()
    group = dist.new_group([1, 2, 3], timeout=timedelta(seconds=20))  # ranks are those of the group
    if rank == 0:
        return
    parts = [Part("a.weight", (9, 5), (rank * 3 - 3, 0), torch.ones(3, 5))]
    failing = Unreadable(parts)
    failing.error = error = MemoryError("no room for a box")
    with pytest.raises(MemoryError if rank == 2 else PushAborted) as caught:
        measured(failing if rank == 2 else PartSource(parts), recipe, group)
    if rank == 2:
        assert caught.value is error
    else:
        assert isinstance(caught.value, PushAborted)
        assert caught.value.message == "trainer rank 1 failed: MemoryError('no room for a box')"
        assert caught.value.rank == 1
    failing.error = SourceError("the file has gone", hint="put it back")
    with pytest.raises(SourceError if rank != 1 else PushAborted) as caught:
        measured(failing if rank != 1 else PartSource(parts), recipe, group)
    if rank == 1:
        assert isinstance(caught.value, PushAborted)
        assert caught.value.message == "trainer rank 1 failed: the file has gone (and 1 more ranks)"
        assert (caught.value.rank, caught.value.hint) == (1, "put it back")
    failing.error = SourceError("the disk has gone")  # all of them, alike
    with pytest.raises(SourceError, match="the disk has gone"):
        measured(failing, recipe, group)
    undescribed = Undescribed(SourceError("tensor 'a' is on the meta device"), group, reduces=True)
    with pytest.raises(SourceError if rank == 3 else PushAborted, match="tensor 'a' is on the meta device"):
        undescribed.measure() if rank == 3 else measured(PartSource(parts), recipe, group)
    measured(PartSource(parts), recipe, group)  # and the group is as good as before


def built(**options: Any) -> tuple[Model, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = Model(**options)
    return model, {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def sharded(model: Model, **options: Any) -> nn.Module:
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    recipe = Fp8((4, 3), KEEP, all_reduce=True)

    model, whole = built(width=6, inner=10)  # 10 rows are 3, 3, 3 and 1
    fsdp2 = sharded(model)
    record("fsdp2", fsdp2, recipe, whole)
    with pytest.raises(SourceError, match=r"'layers\.0\.up\.weight' cannot be quantised by this rank alone"):
        measured(fsdp2, Fp8((4, 3), KEEP))
    record("tensor", fsdp2, Fp8(None, KEEP, all_reduce=True), whole)

    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    model, whole = built(width=6, inner=10)
    record("hybrid", sharded(model, mesh=both), recipe, whole)
    model, whole = built(width=16, inner=16)  # blocks end where shards do: no collective is needed
    record("aligned", sharded(model), Fp8((4, 3), KEEP), whole)
    model, whole = built(tied=True)
    record("tied", sharded(model), Fp8((4, 3), (), all_reduce=True), whole)

    warnings.simplefilter("ignore")
    model, whole = built(width=7, inner=9)
    for i, layer in enumerate(model.layers):
        model.layers[i] = FSDP1(layer, device_id=torch.device("cpu"), use_orig_params=bool(i))
    flat = FSDP1(model, device_id=torch.device("cpu"))
    record("fsdp1", flat, recipe, whole)

    # Half of the ranks hold nothing of the only matrix
    small = FSDP1(nn.Sequential(nn.Linear(1, 16)), device_id=torch.device("cpu"))
    for only in (None, "0.*"):
        held = quantised(source_of(small, only=only), recipe).layout().tensors.dtypes
        assert ("float8_e4m3fn" in held) == (rank < 2)

    # Ranks that know different tensors, two of each; halves that end within a block
    torch.manual_seed(2)
    stages = {f"layers.{i}.weight": torch.randn(10, 5) for i in range(2)}
    name = f"layers.{rank // 2}.weight"
    half = stages[name][rank % 2 * 5 :][:5]
    record("stages", PartSource([Part(name, (10, 5), (rank % 2 * 5, 0), half)]), recipe, stages)

    # What is no number on one rank is none on any that shares its block
    odd = half.clone()
    odd[4 - rank % 2 * 4, 0] = float("nan") if rank == 0 else 1.0
    parts = PartSource([Part(name, (10, 5), (rank % 2 * 5, 0), odd)])
    if rank < 2:
        with pytest.raises(SourceError, match=r"'layers.0.weight' has a NaN or an infinity, in block \[1, 0\]"):
            measured(parts, recipe)
    else:
        measured(parts, recipe)
    with pytest.raises(SourceError, match=r"'layers.0.weight' has \(3, 2\) blocks on one rank and \(4, 2\)"):
        measured(PartSource([Part("layers.0.weight", (10 + rank, 5), (0, 0), torch.ones(1, 5))]), recipe)
    ranks_that_fail(recipe)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads end some processes that end in order


if __name__ == "__main__":
    main()
