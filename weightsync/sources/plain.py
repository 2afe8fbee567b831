"""A rank's data of one tensor: memory that can be read as it is, or the reason why there is none."""

from __future__ import annotations

import torch
from torch.nn.parameter import is_lazy

from weightsync.errors import SourceError
from weightsync.sources.dtensors import Box, dtensor_boxes, is_dtensor

__all__ = ["data_and_boxes", "is_gone", "plain_data"]


def data_and_boxes(name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, list[Box]]:
    """Return this rank's data of a tensor, detached, and the boxes of the tensor that lie in it.

    Raises `SourceError` naming the tensor.
    """
    # A rank's stretch of a parameter that FSDP1 flattened is always 1-D. In summon_full_params a whole bias is, too.
    if getattr(tensor, "_is_flat_param", False) or (getattr(tensor, "_fsdp_flattened", False) and tensor.dim() <= 1):
        raise SourceError(
            f"tensor {name!r} is a rank's stretch of a flat parameter of FSDP1, and does not say what of",
            hint="give the module that FSDP wraps it in, not its parameters; inside summon_full_params, clones of them",
        )
    whole = getattr(tensor, "ds_shape", None)
    if whole is not None and tuple(whole) != tuple(tensor.shape):
        raise SourceError(
            f"tensor {name!r} of shape {tuple(whole)} is partitioned by DeepSpeed (ZeRO-3), and what is here of it is "
            f"{tuple(tensor.shape)}",
            hint="push inside of deepspeed.zero.GatheredParameters(parameters), or train with ZeRO-2 or FSDP",
        )
    if is_dtensor(tensor):
        local, boxes = dtensor_boxes(name, tensor)
    else:
        if is_lazy(tensor):
            raise SourceError(f"tensor {name!r} is not initialised yet")
        local, none = tensor, (0,) * tensor.dim()
        boxes = [Box(none, none, tuple(tensor.shape))]
    return plain_data(name, local), boxes


def is_gone(local: torch.Tensor) -> bool:
    """Whether a tensor has elements, but no memory for them."""
    return local.numel() > 0 and not (local.data_ptr() and local.untyped_storage().nbytes())


def plain_data(name: str, local: torch.Tensor) -> torch.Tensor:
    """Return `local` detached, if its memory can be read as it is. Raises `SourceError` naming the tensor."""
    if type(local).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise SourceError(
            f"tensor {name!r} is a {type(local).__name__}, which cannot be pushed", hint="give its plain tensors"
        )
    if local.layout != torch.strided or local.is_quantized:
        raise SourceError(f"tensor {name!r} is sparse or quantised", hint="give dense tensors, scales as their own")
    if local.is_meta:
        raise SourceError(f"tensor {name!r} is on the meta device: it has no data")
    if local.is_neg():
        raise SourceError(f"tensor {name!r} is a view that negates what is in memory", hint="give its .resolve_neg()")
    if is_gone(local):
        raise SourceError(
            f"tensor {name!r} has no memory on this rank: it was offloaded or freed",
            hint="load it back before the push; FSDP2 frees what it gathers: give the module, not its parameters",
        )
    return local.detach()
