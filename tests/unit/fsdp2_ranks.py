"""Run by torchrun for test_sources_fsdp2.py: real FSDP2 ranks that write down what their sources say and hold."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.unit import sources_kit
from tests.unit.sources_kit import Model, raw
from weightsync.errors import SourceError
from weightsync.sources import LoraSource, ModuleSource, TensorSource, source_of

if TYPE_CHECKING:
    from weightsync.plan.manifest import Layout

OUT = Path(sys.argv[1])
TOKENS = torch.tensor([[1, 2, 3]])


def record(case: str, weights: nn.Module | dict[str, Any] | LoraSource, named: dict[str, Any] | None = None) -> None:
    """Write this rank's layout and shards; rank 0 also writes the whole tensors, `named` if those are given."""
    sources_kit.record(OUT, case, dist.get_rank(), source_of(weights))
    if named is None:
        named = dict(weights.named_parameters()) if isinstance(weights, nn.Module) else cast("dict[str, Any]", weights)
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in named.items()}
    if dist.get_rank() == 0:
        sources_kit.record_whole(OUT, case, whole)


def described_again(weights: nn.Module | dict[str, Any], *, same: bool) -> None:
    """What is recalled of weights described before, now the same or not, is what describing from the start gives."""
    before = last.get("layout")
    source = source_of(weights)
    anew = ModuleSource(weights) if isinstance(weights, nn.Module) else TensorSource(weights)
    last["layout"] = layout = source.layout()
    assert layout == anew.layout()
    assert (layout is before) == same
    for i in range(len(layout)):
        found, expected = source.local(i), anew.local(i)
        assert found is not None
        assert found.shape == expected.shape == layout.shard(i).shape
        assert found.numel() == 0 or found.data_ptr() == expected.data_ptr()
        assert found.equal(expected)
        data = source.box_bytes(i, (0,) * found.dim(), layout.shard(i).shape)
        assert data is not None
        assert data.tobytes() == raw(found.clone()).tobytes()


last: dict[str, Layout] = {}  # described


def recalled(mesh: DeviceMesh) -> None:
    """FSDP2's parameters as training, moving and exchanging them leaves them."""
    model = sharded(Model())
    described_again(model, same=False)
    train(model)
    described_again(model, same=True)
    described_again(sharded(Model()), same=True)
    described_again(dict(model.state_dict()), same=True)
    described_again(model, same=True)
    cast("FSDPModule", model).unshard()
    described_again(model, same=True)  # resharded
    described_again(model, same=True)
    model.to(torch.float64)  # which swaps tensors, and torch refuses that where there are weak references to one
    described_again(model, same=False)
    described_again(model, same=True)

    world = mesh.size()
    rows = distribute_tensor(torch.rand(2 * world, 2 * world), mesh, [Shard(0)])
    described_again({"t": rows}, same=False)
    described_again({"t": distribute_tensor(torch.rand(2 * world, 2 * world), mesh, [Shard(0)])}, same=True)
    # all of these have as much on this rank, or on some rank
    local = rows.to_local()
    described_again({"t": DTensor.from_local(local, mesh, [Replicate()], run_check=False)}, same=False)
    described_again({"t": distribute_tensor(torch.rand(2 * world - 1, 2 * world), mesh, [Shard(0)])}, same=False)
    described_again({"t": local}, same=False)
    described_again({"t": rows}, same=False)
    described_again({"t": rows, "again": rows}, same=False)
    described_again({"t": rows, "again": rows.clone()}, same=False)
    described_again({"t": rows, "again": local}, same=False)
    with pytest.raises(SourceError, match="sum over ranks"):
        source_of({"t": DTensor.from_local(local, mesh, [Partial()], run_check=False)})


def sharded(model: Model, mesh: DeviceMesh | None = None, **options: Any) -> Model:
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def train(model: nn.Module) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(TOKENS).sum().backward()
    optimiser.step()


def evaluated() -> None:
    """A root that keeps what a forward without gradients has gathered, while the optimiser steps: that copy is of the
    past, and of the type that the model computes in.
    """
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for case, described in (("evaluated", False), ("evaluated-again", True)):
        model = sharded(Model(), mp_policy=policy)
        held = dict(model.named_parameters())
        if described:
            source_of(model)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        model(TOKENS).sum().backward()
        with torch.no_grad():
            model(TOKENS)
        optimiser.step()
        assert not any(isinstance(p, DTensor) for p in model.head.parameters()), "gathered"
        record(case, model, held)
        with torch.no_grad():
            model(TOKENS)
        assert ModuleSource(model).layout().tensors.dtypes == ("float32",) * len(held)


def evaluated_with_adapters() -> None:
    """As `evaluated`, of a model with LoRA."""
    peft = pytest.importorskip("peft")
    model = Model()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["up"]), model)
    held = dict(sharded(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)).named_parameters())
    with torch.no_grad():
        model(TOKENS)
        for parameter in held.values():
            parameter.copy_(torch.full_like(parameter, 3.0))  # sums of whole numbers are the same in any order
    whole = {name: cast("DTensor", p.detach()).full_tensor() for name, p in held.items()}
    merged = {name.replace(".base_layer", ""): t for name, t in whole.items() if "lora_" not in name}
    for i in range(2):
        a, b = (whole[f"layers.{i}.up.lora_{which}.default.weight"] for which in "AB")
        merged[f"layers.{i}.up.weight"] += b @ a
    record("evaluated-lora", LoraSource(model, gather=True), merged)


def amid_a_step() -> None:
    """Between forward and backward a push changes nothing; inside of one of them it is refused."""
    gradients = []
    for between in (lambda _: None, source_of):
        torch.manual_seed(1)
        model = sharded(Model())
        loss = model(TOKENS).sum()
        between(model)
        loss.backward()
        gradients.append([cast("DTensor", p.grad).to_local() for p in model.parameters()])
    assert all(map(torch.equal, *gradients))

    model = sharded(Model())
    refused = []

    def push(*_: Any) -> None:
        with pytest.raises(SourceError, match="inside a forward or backward of FSDP2") as caught:
            source_of(model)
        refused.append(caught.value)

    inside = model.head.register_forward_hook(push)
    out = model(TOKENS)
    inside.remove()
    hidden = model.embed.register_full_backward_hook(push)
    out.sum().backward()
    model(TOKENS).sum().backward()
    hidden.remove()
    assert len(refused) == 2
    source_of(model)


def inside_out(mesh: DeviceMesh) -> None:
    """A tensor cut along the mesh's dimensions in another order than theirs, which placements do not say."""
    import torch.distributed.tensor._dtensor_spec as spec

    if not hasattr(spec, "ShardOrderEntry"):
        return  # torch has no such order
    whole = torch.arange(8)
    meta = spec.TensorMeta(whole.shape, whole.stride(), whole.dtype)
    for mesh_dims, refused in (((0, 1), False), ((1, 0), True)):
        order = (spec.ShardOrderEntry(tensor_dim=0, mesh_dims=mesh_dims),)
        cut = spec.DTensorSpec(mesh, (Shard(0), Shard(0)), meta, shard_order=order)
        tensor = DTensor(whole[:2].clone(), cut, requires_grad=False)
        if not refused:
            source_of({"o": tensor})  # which is remembered
            continue
        for make in (source_of, TensorSource):
            with pytest.raises(SourceError, match=r"'o' is cut in another order than that of its mesh's dimensions"):
                make({"o": tensor})


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # the same weights everywhere before they are sharded
    world = dist.get_world_size()

    model = sharded(Model())
    train(model)
    record("trained", model)
    record("state_dict", dict(model.state_dict()))
    record("tied", sharded(Model(tied=True)))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    record("bfloat16", sharded(Model().to(torch.bfloat16), mp_policy=policy, reshard_after_forward=False))
    unsharded = sharded(Model(), reshard_after_forward=False)
    cast("FSDPModule", unsharded).unshard()
    record("unsharded", unsharded)
    evaluated()
    evaluated_with_adapters()
    amid_a_step()
    record("narrow", sharded(Model(width=1, inner=2)))  # fewer rows than ranks: some ranks hold nothing

    mesh = init_device_mesh("cpu", (world,))
    whole = torch.arange(35.0).reshape(5, 7)
    columns = distribute_tensor(whole, mesh, [Shard(1)])
    record("mapping", {"columns": columns, "all": distribute_tensor(whole, mesh, [Replicate()]), "plain": whole[:2]})
    recalled(mesh)
    partial = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    with pytest.raises(SourceError, match=r"'p' has placement .*sum over ranks"):
        TensorSource({"p": partial})

    if world == 3:  # a tensor that only ranks 0 and 2 have
        some = DeviceMesh("cpu", [0, 2])
        record("submesh", {"t": distribute_tensor(whole, some, [Shard(0)]), "all": whole})
    if world == 4:
        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
        record("hybrid", sharded(Model(), both))
        record("grid", {"g": distribute_tensor(whole, both, [Shard(0), Shard(1)])})
        record("nested", {"n": distribute_tensor(whole, both, [Shard(0), Shard(0)])})
        # FSDP over tensor parallelism: FSDP cuts what tensor parallelism has cut (strided shards).
        parallel = Model(width=8, inner=16)
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        for layer in parallel.layers:
            parallelize_module(layer, both["inner"], plan)
        record("tensor_parallel", sharded(parallel, both["outer"]))
        from torch.distributed.tensor.placement_types import _StridedShard

        rows = torch.arange(64.0).reshape(16, 4)
        local = torch.cat([rows[4 * i + 2 * both.get_local_rank("outer") :][:2] for i in range(4)])
        gaps = DTensor.from_local(local, both, [_StridedShard(0, split_factor=4), Replicate()], run_check=False)
        record("gaps", {"g": gaps})
        uneven = DTensor.from_local(rows[:2], both, [_StridedShard(0, split_factor=3), Replicate()], run_check=False)
        with pytest.raises(SourceError, match=r"'u' of shape .* is sharded unevenly"):
            TensorSource({"u": uneven})
        inside_out(both)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads end some processes that end in order


if __name__ == "__main__":
    main()
