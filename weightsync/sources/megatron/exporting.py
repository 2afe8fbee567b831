"""Exports parameters without a rule: mbridge makes whole checkpoint tensors of them, one parameter at a time.

mbridge 0.15.1's `Bridge.export_weights` gathers every parameter over all ranks. Only its steps for one parameter are
used here: merge the shares of the tensor-parallel ranks, then take the result apart into the checkpoint's tensors.
Stages of the pipeline and groups of experts export their own parameters, and nothing is sent between them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from weightsync.errors import SourceError
from weightsync.sources.parts import Part

if TYPE_CHECKING:
    from weightsync.sources.megatron.stages import Stage

__all__ = ["Exporter"]

_STEPS = ("_weight_name_mapping_mcore_local_to_global", "_weight_merge_across_tp", "_weight_to_hf_format")


class Exporter:
    """Exports the parameters of one stage through one mbridge bridge."""

    def __init__(self, bridge: Any, stage: Stage) -> None:
        """Raises `SourceError` for a bridge that is not mbridge's."""
        missing = [step for step in _STEPS if not hasattr(bridge, step)]
        if missing:
            raise SourceError(
                f"{type(bridge).__module__}.{type(bridge).__name__} is no bridge of mbridge: it has no {missing[0]}",
                hint="bridge= takes what mbridge.AutoBridge.from_pretrained gives",
            )
        self._bridge, self._stage = bridge, stage
        self._names: dict[str, str] = bridge._weight_name_mapping_mcore_local_to_global(stage.model)

    def parts(self, place: int) -> list[Part]:
        """Return the whole checkpoint tensors that are made of one parameter.

        This is a collective of the ranks that the parameter is cut across. Raises `SourceError` if the bridge does not
        know the parameter either.
        """
        name, tensor = self._stage.names[place], self._stage.tensors[place]
        of_experts = ".mlp.experts." in name
        marked = bool(getattr(tensor, "tensor_model_parallel", False))
        group = self._stage.group(experts=of_experts)
        try:
            with torch.no_grad():
                merged = tensor.detach()
                if group.world > 1 and (marked or of_experts):
                    shares = [torch.empty_like(merged) for _ in range(group.world)]
                    torch.distributed.all_gather(shares, merged.contiguous(), group=group.process_group)
                    merged = self._bridge._weight_merge_across_tp(self._names[name], shares, tensor)
                names, tensors = self._bridge._weight_to_hf_format(self._names[name], merged)
        except (NotImplementedError, AssertionError, KeyError, ValueError) as error:
            raise SourceError(
                f"no rule says where Megatron parameter {name!r} lies in the checkpoint, and "
                f"{type(self._bridge).__name__} cannot export it: {error!r}",
                hint="give a rule for it (rules=), or leave it out with None for its rule",
            ) from error
        return [Part(one, tuple(data.shape), (0,) * data.dim(), data) for one, data in zip(names, tensors, strict=True)]
