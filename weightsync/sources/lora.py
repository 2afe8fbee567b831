"""Modules with peft's LoRA adapters, which are merged into the weights on their way into slots."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from weightsync.errors import SourceError
from weightsync.sources.description import narrowed
from weightsync.sources.dtensors import dtensor_boxes, is_dtensor
from weightsync.sources.fsdp2 import reshard_all
from weightsync.sources.lora_layers import base_tensors
from weightsync.sources.plain import plain_data
from weightsync.sources.tensors import TensorSource
from weightsync.sources.wrappers import is_fsdp1

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt
    from torch import nn

    from weightsync.plan.manifest import Layout
    from weightsync.sources.lora_layers import BaseTensor, Lora

__all__ = ["LoraSource"]


class LoraSource:
    """The parameters of the base model, under its own names, with the active adapters merged into those they adapt.

    A merged tensor is never stored: each box of it is computed into its slot, with peft's own operations in peft's
    order (see `_Term`). So engines get what `merge_and_unload()` would give. The model is not changed.

    module: a `PeftModel`, or any module into which peft has put LoRA layers. It is described as it is now: make a new
        source after adapters were added, switched or merged.
    gather: gather a copy of all LoRA matrices now, if FSDP2 has sharded some that a rank needs whole. This is a
        collective, so construct the source at the same point on all ranks. Make a new one for each push, since the
        copy has the values of this moment.
    """

    def __init__(self, module: nn.Module, *, gather: bool = False) -> None:
        """Raises `SourceError` naming the layer or tensor that cannot be pushed merged."""
        modules = list(module.modules())
        if any(map(is_fsdp1, {*map(type, modules)})):
            raise SourceError(
                "LoRA adapters under FSDP1 are cut out of flat parameters, and cannot be merged on their way",
                hint="shard with torch.distributed.fsdp.fully_shard, or push the adapter alone: push_lora",
            )
        reshard_all(modules)
        found = base_tensors(module)
        self._base = TensorSource.recalled(tuple(one.name for one in found), [one.tensor for one in found])
        layout = self._base.layout()
        _check_ties(found, layout)
        adapted = {one.name: one for one in found if one.loras}
        matrices = _Matrices(gather)
        self._terms: dict[int, tuple[_Term, ...]] = {}  # by merged shard
        names = layout.tensors.names
        for shard, tensor in enumerate(layout.tensor.tolist()):
            one = adapted.get(names[tensor])
            if one is not None:
                offset, shape = layout.shard(shard).offset, layout.shard(shard).shape
                self._terms[shard] = tuple(matrices.term(one, lora, offset, shape) for lora in one.loras)

    @property
    def nbytes(self) -> int:
        """Bytes of all shards together."""
        return self._base.nbytes

    @property
    def names(self) -> tuple[str, ...] | None:
        """The names of all tensors of the base model, tied ones too."""
        return self._base.names

    def layout(self) -> Layout:
        """What this rank holds of the base model."""
        return self._base.layout()

    def local(self, shard: int) -> torch.Tensor | None:
        """A shard's own memory; None for one that is merged."""
        return None if shard in self._terms else self._base.local(shard)

    def box_bytes(
        self, shard: int, src_offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> npt.NDArray[np.uint8] | None:
        """The bytes of a box as `TensorSource` gives them; None for a shard that is merged."""
        return None if shard in self._terms else self._base.box_bytes(shard, src_offset, shape)

    def read_into(self, shard: int, src_offset: tuple[int, ...], shape: tuple[int, ...], out: torch.Tensor) -> None:
        """Copy a box into `out`. It is merged where the weight lies, but on the GPU of `out` if both are on GPUs.

        This takes memory for the product of two matrices, of the box's shape and the adapter's type; and for a box of
        the weight if it is not merged in `out` itself.
        """
        terms = self._terms.get(shard)
        if terms is None:
            self._base.read_into(shard, src_offset, shape, out)
            return
        weight = self._base.local(shard).detach()
        if tuple(out.shape) != shape or out.dtype != weight.dtype:
            raise ValueError(f"a box of {weight.dtype} {shape} does not go into {out.dtype} {tuple(out.shape)}")
        # On the GPU of `out`, because the filling's stream there waits for the work that the trainer has queued.
        device = out.device if out.is_cuda and weight.is_cuda else weight.device
        merged = out if out.device == device else torch.empty(shape, dtype=out.dtype, device=device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            merged.copy_(narrowed(weight, src_offset, shape))
            for term in terms:
                merged += term.box(src_offset, shape, device)
            if merged is not out:
                out.copy_(merged)


class _Term(NamedTuple):
    """What one adapter adds to one shard."""

    a: torch.Tensor  # [r, in] of the shard
    b: torch.Tensor  # [out, r] of the shard
    scaling: float
    transposed: bool

    def box(self, offset: tuple[int, ...], shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """Compute a box, at `offset` in the shard, in the same order of operations as peft's `get_delta_weight`.

        Matrices of 16 bits are multiplied as they are on a GPU, and in float32 on a CPU. The product is scaled, then
        rounded to the adapter's type. peft adds it to the weight in place, which rounds once, to the weight's type.
        """
        (out_at, in_at), (out_length, in_length) = _oriented(offset, self.transposed), _oriented(shape, self.transposed)
        a = self.a.narrow(1, in_at, in_length).to(device)
        b = self.b.narrow(0, out_at, out_length).to(device)
        dtype = b.dtype
        if device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
            a, b = a.float(), b.float()
        product = (b @ a).mul_(self.scaling).to(dtype)
        return product.T if self.transposed else product


class _Matrices:
    """The LoRA matrices, or the boxes of them that this rank holds."""

    def __init__(self, gather: bool) -> None:
        self._gather = gather
        self._held: dict[int, list[tuple[tuple[int, ...], torch.Tensor]]] = {}  # by id of the matrix: offsets, boxes

    def term(self, to: BaseTensor, lora: Lora, offset: tuple[int, ...], shape: tuple[int, ...]) -> _Term:
        """Return what `lora` adds to a shard: the box of `to` of this offset and shape."""
        rank = lora.a.shape[0]
        whole = _oriented((lora.b.shape[0], lora.a.shape[1]), lora.transposed)
        if tuple(to.tensor.shape) != whole or lora.b.shape[1] != rank or to.tensor.dtype.itemsize < 2:
            raise SourceError(
                f"tensor {to.name!r} is {to.tensor.dtype} {tuple(to.tensor.shape)}, to which adapter {lora.adapter!r} "
                f"adds {tuple(lora.b.shape)} times {tuple(lora.a.shape)}",
                hint="the base model must be loaded unquantised and whole, or sharded by fully_shard",
            )
        (out_at, in_at), (out_length, in_length) = _oriented(offset, lora.transposed), _oriented(shape, lora.transposed)
        if 0 in shape:
            out_length = in_length = 0
        return _Term(
            self._box(to.name, lora, "A", (0, in_at), (rank, in_length)),
            self._box(to.name, lora, "B", (out_at, 0), (out_length, rank)),
            lora.scaling,
            lora.transposed,
        )

    def _box(self, name: str, lora: Lora, which: str, offset: tuple[int, int], shape: tuple[int, int]) -> torch.Tensor:
        matrix = lora.a if which == "A" else lora.b
        called = f"lora_{which} ({lora.adapter}) of {name}"
        if id(matrix) not in self._held:  # all ranks get here in the same order, with empty shards too: it may gather
            self._held[id(matrix)] = self._boxes(called, matrix)
        if 0 in shape:
            return torch.empty(shape, dtype=matrix.dtype, device="cpu")
        for start, held in self._held[id(matrix)]:
            inside = tuple(at - first for at, first in zip(offset, start, strict=True))
            if all(at >= 0 and at + n <= room for at, n, room in zip(inside, shape, held.shape, strict=True)):
                return narrowed(held, inside, shape)
        raise SourceError(
            f"this rank holds a part of tensor {name!r}, but not what adapter {lora.adapter!r} adds to it: its "
            f"lora_{which} is sharded too",
            hint="push LoraSource(model, gather=True), made on all ranks at the same place: it gathers the LoRA "
            "matrices alone; or keep them out of fully_shard (ignored_params), the same on all ranks",
        )

    def _boxes(self, called: str, matrix: torch.Tensor) -> list[tuple[tuple[int, ...], torch.Tensor]]:
        with torch.no_grad():
            if not is_dtensor(matrix):
                return [((0, 0), plain_data(called, matrix))]
            if self._gather:
                return [((0, 0), plain_data(called, matrix.full_tensor()))]
            local, boxes = dtensor_boxes(called, matrix)
            return [(box.offset, narrowed(plain_data(called, local), box.start, box.shape)) for box in boxes]


def _oriented(pair: Sequence[int], transposed: bool) -> tuple[int, int]:
    """Swap rows and columns if the weight is the transpose of B times A."""
    rows, columns = pair
    return (columns, rows) if transposed else (rows, columns)


def _check_ties(found: list[BaseTensor], layout: Layout) -> None:
    """Raise `SourceError` if adapters add different terms to two names of a tied tensor."""
    by_name = {one.name: one for one in found}
    for other, name in layout.tensors.aliases:
        one, two = by_name[name], by_name[other]
        if [lora.key for lora in one.loras] != [lora.key for lora in two.loras]:
            raise SourceError(
                f"tensors {name!r} and {other!r} are tied, and adapters change them differently: engines that tie them "
                "would serve one for both",
                hint="take these layers out of target_modules, or untie them before get_peft_model",
            )
