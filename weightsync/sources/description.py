"""Describes named tensors by a layout. A description is used again as long as tensors look the same.

It holds no tensor, nor a weak reference to one: `torch.utils.swap_tensors`, by which FSDP2 models move between devices,
refuses tensors with weak references. So tensors are not recognised by identity, but by everything that a layout depends
on: names and their order, classes, element types, shapes (for DTensors, their specs and how much of them lies here),
and which tensors share memory. All of this is read anew for each push. If none of it has changed, neither has the
layout, whatever the addresses. If anything has, everything is described anew.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from operator import attrgetter, eq, is_
from typing import TYPE_CHECKING, Any

import torch

from weightsync.errors import SourceError
from weightsync.plan.dtypes import dtype_named
from weightsync.plan.manifest import Layout, Shard
from weightsync.sources.dtensors import is_dtensor
from weightsync.sources.plain import data_and_boxes, is_gone
from weightsync.sources.recent import Recent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.sources.dtensors import Box

__all__ = ["describe", "narrowed", "recall"]

_dtype_of = attrgetter("dtype")
# Used instead of DTensor's public accessors, because `to_local` makes a view of every parameter, which takes 3 µs.
_local_of = attrgetter("_local_tensor")
_spec_of = attrgetter("_spec")
# Hardly any memory lies below this address. If a view's memory was freed, its address is only its offset there.
_LOW = 1 << 32


def describe(names: tuple[str, ...], tensors: Sequence[torch.Tensor]) -> tuple[Layout, list[torch.Tensor]]:
    """Return the layout of named tensors and the memory of each shard, detached.

    Tied tensors are sent under the first name. Raises `SourceError` naming the first tensor that cannot be pushed.
    """
    cut, data = _described(names, tensors)
    return cut.layout, cut.shards(data)


def recall(names: tuple[str, ...], tensors: Sequence[torch.Tensor]) -> tuple[Layout, list[torch.Tensor]]:
    """Do as `describe`, but in a fiftieth of the time if the tensors look like recent ones.

    The memory may then be the tensors themselves, with their gradients.
    """
    for look in _RECENT:
        data = look.data(names, tensors)
        if data is not None:
            _RECENT.add(look)
            return look.cut.layout, look.cut.shards(data)
    cut, data = _described(names, tensors)
    seen = _look(names, tensors, cut)
    if seen is not None:
        _RECENT.add(seen)
    return cut.layout, cut.shards(data)


@dataclass(frozen=True, eq=False)
class _Cut:
    """How s shards are cut from n tensors. "Data" is what this rank has of a tensor: all of it, or its local part."""

    layout: Layout
    tensors: tuple[int, ...]  # [s] the tensor that the shard is cut from
    parts: dict[int, Box]  # by shard that is empty, or only a part of the tensor's data
    ties: dict[int, int]  # by tensor that is the same as an earlier one: the earlier one

    def shards(self, data: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the memory of each shard, in the shard's shape."""
        shards = [data[i] for i in self.tensors]
        for i, box in self.parts.items():
            shards[i] = shards[i].new_empty(box.shape) if 0 in box.shape else narrowed(shards[i], box.start, box.shape)
        return shards


@dataclass(frozen=True, eq=False)
class _Look:
    """Everything about n tensors that `cut` depends on."""

    cut: _Cut
    names: tuple[str, ...]
    kinds: list[type]  # [n] classes of the tensors
    sharded: tuple[int, ...]  # the DTensors
    specs: list[Any]  # of the DTensors
    data_kinds: list[type]  # [n] classes of the tensors' data
    dtypes: list[torch.dtype]  # [n]
    counts: list[int]  # [n] elements of the data
    sizes: dict[int, torch.Size]  # by tensor that is no DTensor; a DTensor's spec says what each rank holds
    shared: tuple[int, ...]  # tensors whose data has the address of another's, or none
    views: tuple[int, ...]  # tensors that are neither DTensors nor parameters, and so may be any view

    def data(self, names: tuple[str, ...], tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor] | None:
        """Return the data of these tensors; None if they look different."""
        if names != self.names or list(map(type, tensors)) != self.kinds:
            return None
        if not _same_specs(_specs_of(tensors, self.sharded), self.specs):
            return None
        data = _data_of(tensors, self.sharded)
        if self.sharded and list(map(type, data)) != self.data_kinds:
            return None
        if list(map(_dtype_of, data)) != self.dtypes:
            return None
        try:
            pointers = list(map(torch.Tensor.data_ptr, data))
        except RuntimeError:  # one is sparse by now; describing the tensors names it
            return None
        if list(map(torch.Tensor.numel, data)) != self.counts:
            return None
        plain = data if not self.sharded else map(data.__getitem__, self.sizes)
        if not all(map(eq, map(torch.Tensor.size, plain), self.sizes.values())):
            return None
        if min(pointers, default=_LOW) < _LOW and any(is_gone(data[i]) for i, at in enumerate(pointers) if at < _LOW):
            return None
        if any(map(torch.Tensor.is_neg, map(data.__getitem__, self.views))):
            return None
        return data if self._as_tied(tensors, data, pointers) else None

    def _as_tied(self, tensors: Sequence[torch.Tensor], data: Sequence[torch.Tensor], pointers: list[int]) -> bool:
        """Whether the same tensors are tied as before.

        The tensors outside `shared` are not tied if they have as many different addresses, none of them shared.
        """
        addresses = set(pointers)
        shared = {pointers[i] for i in self.shared}
        if len(addresses) - len(shared) != len(pointers) - len(self.shared) or (0 in addresses) != (0 in shared):
            return False
        return _ties(self.shared, tensors, data) == self.cut.ties


_RECENT: Recent[_Look] = Recent()


def _described(names: tuple[str, ...], tensors: Sequence[torch.Tensor]) -> tuple[_Cut, list[torch.Tensor]]:
    """Work out how shards are cut from these tensors. Also returns the tensors' data, detached."""
    data: list[torch.Tensor] = []
    boxes: list[list[Box]] = []
    seen: set[str] = set()
    with torch.no_grad():
        for name, tensor in zip(names, tensors, strict=True):
            if name in seen:
                raise SourceError(f"tensor {name!r} is given twice")
            seen.add(name)
            held, parts = data_and_boxes(name, tensor)
            dtype_named(str(held.dtype), name)
            data.append(held)
            boxes.append(parts)
    ties = _ties(_shared([held.data_ptr() for held in data]), tensors, data)
    shards: list[Shard] = []
    lies_in: list[int] = []
    parts_of: dict[int, Box] = {}
    for i, name in enumerate(names):
        if i in ties:
            continue
        dtype, held_shape, shape = str(data[i].dtype).removeprefix("torch."), tuple(data[i].shape), tensors[i].shape
        for box in boxes[i]:
            if box.shape != held_shape or 0 in box.shape:
                parts_of[len(shards)] = box
            shards.append(Shard(name, dtype, tuple(shape), box.offset, box.shape))
            lies_in.append(i)
    layout = Layout.of(shards, [(names[i], names[first]) for i, first in ties.items()])
    return _Cut(layout, tuple(lies_in), parts_of, ties), data


def _look(names: tuple[str, ...], tensors: Sequence[torch.Tensor], cut: _Cut) -> _Look | None:
    """Return the look of these tensors, with their `cut`; None if a look does not suffice to recognise them."""
    sharded = tuple(i for i, tensor in enumerate(tensors) if is_dtensor(tensor))
    if not all(hasattr(tensors[i], "_local_tensor") and hasattr(tensors[i], "_spec") for i in sharded):
        return None
    data, of_mesh = _data_of(tensors, sharded), frozenset(sharded)
    if any(type(held).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ for held in data):
        return None  # the data is still being gathered
    shared = _shared([held.data_ptr() for held in data])
    if _ties(shared, tensors, data) != cut.ties:
        return None
    return _Look(
        cut=cut,
        names=names,
        kinds=list(map(type, tensors)),
        sharded=sharded,
        specs=_specs_of(tensors, sharded),
        data_kinds=list(map(type, data)),
        dtypes=[held.dtype for held in data],
        counts=[held.numel() for held in data],
        sizes={i: held.shape for i, held in enumerate(data) if i not in of_mesh},
        shared=shared,
        views=tuple(i for i, held in enumerate(data) if i not in of_mesh and not isinstance(held, torch.nn.Parameter)),
    )


def _data_of(tensors: Sequence[torch.Tensor], sharded: tuple[int, ...]) -> Sequence[torch.Tensor]:
    """Return the data of each tensor; `sharded` are the DTensors."""
    if not sharded:
        return tensors
    if len(sharded) == len(tensors):
        return list(map(_local_of, tensors))
    data = list(tensors)
    for i in sharded:
        data[i] = _local_of(data[i])
    return data


def _specs_of(tensors: Sequence[torch.Tensor], sharded: tuple[int, ...]) -> list[Any]:
    """Return the specs of the DTensors."""
    return list(map(_spec_of, tensors if len(sharded) == len(tensors) else map(tensors.__getitem__, sharded)))


def _same_specs(specs: list[Any], known: list[Any]) -> bool:
    """Whether DTensors with these specs are cut alike, and by a process at the same place in its meshes."""
    return all(map(is_, specs, known)) or all(map(_same_spec, specs, known))


def _same_spec(a: Any, b: Any) -> bool:
    if a is b:
        return True
    known = a.tensor_meta is not None  # without it, equal specs leave the global shape open
    return bool(known and a == b and a.mesh.get_coordinate() == b.mesh.get_coordinate())


def _shared(pointers: list[int]) -> tuple[int, ...]:
    """Return the indices of addresses that occur several times or are null."""
    counts = Counter(pointers)
    return tuple(i for i, pointer in enumerate(pointers) if not pointer or counts[pointer] > 1)


def _ties(shared: Sequence[int], tensors: Sequence[torch.Tensor], data: Sequence[torch.Tensor]) -> dict[int, int]:
    """Map each tensor of `shared` that is an earlier one, or the same memory seen in the same way, to that one."""
    objects: dict[int, int] = {}
    memory: dict[tuple[object, ...], int] = {}
    ties: dict[int, int] = {}
    for i in shared:
        key = _memory_key(tensors[i], data[i])
        first = objects.get(id(tensors[i]))
        if first is None and key is not None:
            first = memory.get(key)
        if first is not None:
            ties[i] = first
            continue
        objects[id(tensors[i])] = i
        if key is not None:
            memory[key] = i
    return ties


def _memory_key(tensor: torch.Tensor, data: torch.Tensor) -> tuple[object, ...] | None:
    """Return a key that tensors share if and only if they are the same memory seen in the same way; None: no memory."""
    if not data.numel():
        return None
    key = (data.device, data.data_ptr(), tuple(data.shape), data.stride(), data.dtype, tuple(tensor.shape))
    return (*key, tuple(map(str, tensor.placements))) if is_dtensor(tensor) else key


def narrowed(tensor: torch.Tensor, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Return a view of the box of this shape at `offset`; `tensor` itself if the box is all of it."""
    for dim, (start, length) in enumerate(zip(offset, shape, strict=True)):
        if length != tensor.shape[dim]:
            tensor = tensor.narrow(dim, start, length)
    return tensor
