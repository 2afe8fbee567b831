"""A trainer rank's weights in host memory: random bytes in the shapes of a model, cut as FSDP2 cuts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor, Shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from bench.shapes import Model

__all__ = ["change", "shards", "whole"]

_BLOCK = 1 << 22  # random bytes made for each tensor, then repeated


def whole(model: Model) -> dict[str, torch.Tensor]:
    """Return every tensor of the model, whole."""
    return {name: _random(tensor.shape, tensor.dtype) for name, tensor in model.tensors.items()}


def shards(model: Model, mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """Return this rank's part of every tensor, as DTensors: dimension 0 is cut into chunks."""
    rank, world = mesh.get_local_rank(), mesh.size()
    weights: dict[str, torch.Tensor] = {}
    for name, (shape, dtype) in model.tensors.items():
        chunk = -(-shape[0] // world)
        rows = max(0, min(shape[0], (rank + 1) * chunk) - rank * chunk)
        stride = [1] * len(shape)
        for d in range(len(shape) - 2, -1, -1):
            stride[d] = stride[d + 1] * shape[d + 1]
        weights[name] = DTensor.from_local(
            _random((rows, *shape[1:]), dtype),
            mesh,
            [Shard(0)],
            run_check=False,
            shape=torch.Size(shape),
            stride=tuple(stride),
        )
    return weights


def change(weights: dict[str, torch.Tensor]) -> None:
    """Change some tensors' values in place: enough to notice a push that did nothing."""
    with torch.no_grad():
        for tensor in list(weights.values())[1:50]:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            local.view(torch.uint8).add_(1)


def _random(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=getattr(torch, dtype))
    room = tensor.view(torch.uint8).reshape(-1)
    block = torch.empty(min(_BLOCK, room.numel()), dtype=torch.uint8).random_(0, 256)
    for at in range(0, room.numel(), _BLOCK):
        part = room[at : at + _BLOCK]
        part.copy_(block[: part.numel()])
    return tensor
