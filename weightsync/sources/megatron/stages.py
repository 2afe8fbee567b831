"""A Megatron model as this rank has it: its pipeline stages, their parameters, and each one's place in the whole model.

Nothing here imports `megatron.core`: everything is read from the model, on every rank. The `layer_number` of a layer
counts from 1 over all pipeline stages, virtual ones too (megatron-core 0.16.1, `transformer/transformer_layer.py`). The
`local_expert_indices` of an expert layer are the places of its experts among all experts
(`transformer/moe/moe_layer.py`). `pg_collection` has the process groups.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from weightsync.errors import SourceError
from weightsync.sources.dtensors import is_dtensor
from weightsync.sources.megatron.held import Held
from weightsync.sources.tree import parameters_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Group", "Stage", "bare", "held_of", "sync_parameters"]

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_FSDP = "FSDP cuts parameters in a way that MegatronSource does not know"
_NO_FSDP = "use Megatron's DistributedDataParallel, with the distributed optimizer"
_EXPERTS = "mlp.experts."
_SEQUENTIAL = re.compile(r"^local_experts\.(\d+)\.(.+)$")  # SequentialMLP
_GROUPED = re.compile(r"^(linear_fc[12]\.(?:weight|bias))(\d+)$")  # TEGroupedMLP
_PACKED = {"weight1": "linear_fc1.weight", "weight2": "linear_fc2.weight"}  # GroupedMLP


class Group(NamedTuple):
    """This process's place among the ranks that the same parameters are cut across."""

    rank: int
    world: int
    process_group: Any = None

    @classmethod
    def of(cls, process_group: Any) -> Group:
        if process_group is None:
            return cls(0, 1)
        return cls(process_group.rank(), process_group.size(), process_group)


@dataclass(frozen=True)
class Stage:
    """One pipeline stage, virtual or not: a model without its wrappers, and its parameters as they are now."""

    model: nn.Module
    names: tuple[str, ...]
    tensors: list[torch.Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Stage:
        """Make a stage of a model without wrappers. Raises `SourceError` if it is no Megatron model."""
        if not hasattr(model, "config") or not hasattr(model, "decoder"):
            raise SourceError(
                f"{type(model).__name__} is no language model of megatron-core: it has no config and decoder",
                hint="give the GPTModel, wrapped or not, or the list of its virtual pipeline stages",
            )
        names, tensors, *_ = parameters_of(model)
        biases = _expert_biases(model)
        stage = cls(model, (*names, *biases), [*tensors, *biases.values()])
        stage._check_memory()
        return stage

    def _check_memory(self) -> None:
        """Raise `SourceError` naming the first parameter whose values cannot be read where they lie."""
        kinds: set[Any] = {*map(type, self.tensors)}
        for kind in kinds:
            if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
                name, one = next(pair for pair in zip(self.names, self.tensors, strict=True) if type(pair[1]) is kind)
                if is_dtensor(one):
                    raise SourceError(f"Megatron parameter {name!r} is a DTensor: {_FSDP}", hint=_NO_FSDP)
                raise SourceError(
                    f"Megatron parameter {name!r} is a {kind.__name__}, which has its values in other tensors",
                    hint="keep parameters in bfloat16 or float32, and what is computed from them in fp8",
                )
        if not all(map(torch.Tensor.data_ptr, self.tensors)):
            for name, one in zip(self.names, self.tensors, strict=True):
                if not one.data_ptr() and one.numel():
                    raise SourceError(
                        f"Megatron parameter {name!r} has no memory on this rank: it was offloaded, or never loaded",
                        hint="load the model back before the push",
                    )

    def group(self, *, experts: bool) -> Group:
        """Return the group that parameters are cut across: those of the dense layers, or of experts."""
        groups = getattr(self.model, "pg_collection", None)
        if groups is None:
            raise SourceError(
                f"{type(self.model).__name__} has no pg_collection, which says how it is cut",
                hint="megatron-core 0.16 gives one to each GPTModel",
            )
        return Group.of(getattr(groups, "expt_tp" if experts else "tp", None))

    @property
    def tied(self) -> bool:
        """Whether the output layer has the embedding's weights."""
        return bool(getattr(self.model, "share_embeddings_and_output_weights", False))

    @property
    def first(self) -> bool:
        """Whether the model begins here, with its embedding."""
        return bool(getattr(self.model, "pre_process", True))


def bare(model: nn.Module) -> nn.Module:
    """Return the model inside DDP, Float16Module and the like. Raises `SourceError` for FSDP."""
    *wrappers, inner = _unwrapped(model)
    for wrapper in wrappers:
        kind = type(wrapper)
        if "FullyShardedDataParallel" in kind.__name__:
            raise SourceError(f"the model is wrapped by {kind.__module__}.{kind.__name__}: {_FSDP}", hint=_NO_FSDP)
    return inner


def sync_parameters(model: nn.Module) -> None:
    """Complete the parameters of a model whose DDP gathers them only when the next forward pass needs them.

    With `overlap_param_gather`, a rank has only its own share of the updated parameters after the optimizer's step.
    Megatron does the same before it writes a checkpoint (`force_param_sync`). This is a collective of the data-parallel
    ranks.
    """
    for wrapper in _unwrapped(model):
        options = getattr(wrapper, "ddp_config", None)
        if options is not None and options.use_distributed_optimizer and options.overlap_param_gather:
            wrapper.start_param_sync(force_sync=True)  # type: ignore[operator]


def _unwrapped(model: nn.Module) -> list[nn.Module]:
    """Return the model and all its wrappers, outermost first."""
    found = [model]
    while isinstance(inner := getattr(found[-1], "module", None), nn.Module):
        found.append(inner)
    return found


def held_of(stage: Stage, vocab_size: int | None) -> Iterator[tuple[int, Held]]:
    """Yield all parameters of a stage, each with its place in `stage.tensors`.

    A parameter that holds several experts gives one item for each. Raises `SourceError` naming the first parameter that
    cannot be placed.
    """
    dense, among_experts = stage.group(experts=False), stage.group(experts=True)
    layers: Any = stage.model.decoder.layers  # type: ignore[union-attr]
    for place, (name, tensor) in enumerate(zip(stage.names, stage.tensors, strict=True)):
        found = _LAYER.match(name)
        layer = None if found is None else layers[int(found[1])]
        key = name if found is None else f"decoder.layers.*.{name[found.end() :]}"
        head, experts, rest = key.partition(_EXPERTS)
        group = among_experts if experts else dense
        held = Held(
            key=key,
            where=name,
            data=tensor.detach(),
            config=getattr(layer, "config", stage.model.config),
            rank=group.rank,
            world=group.world,
            layer=None if layer is None else layer.layer_number - 1,
            vocab_size=vocab_size,
        )
        if not experts or layer is None:
            yield place, held
            continue
        for own, expert, data in _of_experts(rest, held, layer.mlp.local_expert_indices):
            yield place, replace(held, key=head + experts + own, data=data, expert=expert)


def _of_experts(name: str, held: Held, indices: Sequence[int]) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yield the experts in one parameter: the end of the key in rules, the index among all experts, and the data."""
    if found := _SEQUENTIAL.match(name):
        yield found[2], indices[int(found[1])], held.data
    elif found := _GROUPED.match(name):
        yield found[1], indices[int(found[2])], held.data
    elif name in _PACKED:  # transposed: inputs come first (`GroupedMLP.forward`)
        hidden = held.config.hidden_size
        shape = (len(indices), hidden, -1) if name == "weight1" else (len(indices), -1, hidden)
        for expert, data in zip(indices, held.data.view(shape), strict=True):
            yield _PACKED[name], expert, data.t()
    else:
        raise held.error("it belongs to experts that are kept in a way not known here")


def _expert_biases(model: Any) -> dict[str, torch.Tensor]:
    """Return what routers add to scores to balance experts: buffers in Megatron, but weights in the checkpoint."""
    if not getattr(model.config, "moe_router_enable_expert_bias", False):
        return {}
    found = {}
    for i, layer in enumerate(model.decoder.layers):
        router = getattr(getattr(layer, "mlp", None), "router", None)
        bias = getattr(router, "expert_bias", None)
        if bias is not None:
            found[f"decoder.layers.{i}.mlp.router.expert_bias"] = bias
    return found
