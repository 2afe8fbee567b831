"""Tensors in memory, by name: plain ones, which this rank holds whole, and DTensors, of which it holds its part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

from weightsync.errors import SourceError
from weightsync.plan.dtypes import dtype_named
from weightsync.plan.manifest import Layout, Shard
from weightsync.sources.dtensors import Box, dtensor_boxes, is_dtensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

__all__ = ["TensorSource"]


class TensorSource:
    """A mapping, or pairs, of names and tensors. Tied tensors (the same memory) are sent once, under the first name.

    The tensors are held and must stay as they are until a push of them is over; an iterable is read to its end at once.
    Changed values are what the next read sees; for tensors that were replaced, make a new source.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> None:
        """Raises `SourceError` naming the first tensor that cannot be pushed."""
        self._tensors: list[torch.Tensor] = []  # the local data of each shard
        shards: list[Shard] = []
        aliases: list[tuple[str, str]] = []
        objects: dict[int, str] = {}
        memory: dict[tuple[object, ...], str] = {}
        kept: list[object] = []  # ids are only good while their objects live
        names: set[str] = set()
        with torch.no_grad():
            for name, tensor in _pairs(weights):
                if name in names:
                    raise SourceError(f"tensor {name!r} is given twice")
                names.add(name)
                local, boxes = _local(name, tensor)
                dtype = dtype_named(str(local.dtype), name).name
                key = _memory_key(tensor, local)
                first = objects.get(id(tensor)) or (memory.get(key) if key is not None else None)
                if first is not None:
                    aliases.append((name, first))
                    continue
                kept.append(tensor)
                objects[id(tensor)] = name
                if key is not None:
                    memory[key] = name
                for start, offset, shape in boxes:
                    shards.append(Shard(name, dtype, tuple(tensor.shape), offset, shape))
                    self._tensors.append(_narrowed(local, start, shape))
        self._kept = kept
        self._layout = Layout.of(shards, aliases)

    @property
    def nbytes(self) -> int:
        """Bytes of all shards together."""
        return self._layout.nbytes

    def layout(self) -> Layout:
        """What this rank holds."""
        return self._layout

    def read_into(self, shard: int, src_offset: tuple[int, ...], shape: tuple[int, ...], out: torch.Tensor) -> None:
        """Copy a box of a shard into `out`."""
        if tuple(out.shape) != shape or out.dtype != self._tensors[shard].dtype:
            raise ValueError(f"a box of shape {shape} does not go into {out.dtype} {tuple(out.shape)}")
        out.copy_(_narrowed(self._tensors[shard], src_offset, shape))

    def box_bytes(
        self, shard: int, src_offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> npt.NDArray[np.uint8] | None:
        """The bytes of a box of a shard; None on an accelerator, or where the last dimension is not contiguous."""
        box = _narrowed(self._tensors[shard], src_offset, shape)
        if box.device.type != "cpu" or box.is_neg():
            return None
        if box.dim() == 0:
            box = box.reshape(1)
        if box.stride(-1) != 1:
            return None
        data: npt.NDArray[np.uint8] = box.view(torch.uint8).numpy()
        data.flags.writeable = False
        return data


def _pairs(weights: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, Any]]:
    """Names and what they name, both checked for their type."""
    for pair in weights.items() if isinstance(weights, Mapping) else weights:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise SourceError(f"an iterable of weights gave {type(pair).__name__}, not a pair of name and tensor")
        name, tensor = pair
        if not isinstance(name, str):
            raise SourceError(f"a tensor's name is {name!r}, not a string")
        if not isinstance(tensor, torch.Tensor):
            raise SourceError(f"{name!r} is {type(tensor).__name__}, not a tensor")
        yield name, tensor


def _local(name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, list[Box]]:
    """The data this rank has of a tensor, and the boxes of the tensor that it holds."""
    if is_dtensor(tensor):
        local, boxes = dtensor_boxes(name, tensor)
    else:
        if is_lazy(tensor):
            raise SourceError(f"tensor {name!r} is not initialised yet")
        local, none = tensor, (0,) * tensor.dim()
        boxes = [Box(none, none, tuple(tensor.shape))]
    if type(local).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise SourceError(
            f"tensor {name!r} is a {type(local).__name__}, which cannot be pushed", hint="give its plain tensors"
        )
    if local.layout != torch.strided or local.is_quantized:
        raise SourceError(f"tensor {name!r} is sparse or quantised", hint="give dense tensors, scales as their own")
    if local.is_meta:
        raise SourceError(f"tensor {name!r} is on the meta device: it has no data")
    return local.detach(), boxes


def _memory_key(tensor: torch.Tensor, local: torch.Tensor) -> tuple[object, ...] | None:
    """What two tensors have in common if and only if they are the same memory seen in the same way; None: no memory."""
    if not local.numel():
        return None
    key = (local.device, local.data_ptr(), tuple(local.shape), local.stride(), local.dtype, tuple(tensor.shape))
    return (*key, tuple(map(str, tensor.placements))) if is_dtensor(tensor) else key


def _narrowed(tensor: torch.Tensor, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """The box of this shape at `offset`; `tensor` itself where that is all of it."""
    for dim, (start, length) in enumerate(zip(offset, shape, strict=True)):
        if length != tensor.shape[dim]:
            tensor = tensor.narrow(dim, start, length)
    return tensor
