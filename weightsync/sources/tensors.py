"""Tensors in memory, by name: this rank holds plain tensors whole, and its part of DTensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import torch

from weightsync.errors import SourceError
from weightsync.sources.description import describe, narrowed, recall

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from weightsync.plan.manifest import Layout

__all__ = ["TensorSource", "named"]


class TensorSource:
    """A mapping, or pairs, of names and tensors. Tied tensors (the same memory) are sent once, under the first name.

    The source keeps the tensors, which must not change until a push of them is over. The next push reads the values
    that they have then; if tensors were replaced, make a new source. An iterable is read to its end at once.
    """

    _names: tuple[str, ...] | None = None

    def __init__(self, weights: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> None:
        """Raises `SourceError` naming the first tensor that cannot be pushed."""
        names, tensors = named(weights)
        self._layout, self._shards = describe(names, tensors)
        self._names = names

    @classmethod
    def recalled(cls, names: tuple[str, ...], tensors: Sequence[torch.Tensor]) -> Self:
        """Make a source of these tensors, without describing them anew if they look like recent ones.

        Raises `SourceError` like the constructor.
        """
        source = cls.__new__(cls)
        source._layout, source._shards = recall(names, tensors)
        source._names = names
        return source

    @property
    def nbytes(self) -> int:
        """Bytes of all shards together."""
        return self._layout.nbytes

    @property
    def names(self) -> tuple[str, ...] | None:
        """The names of all tensors, tied ones too, whether or not this rank has a part of them.

        None if other ranks may have tensors that are not known here.
        """
        return self._names

    def layout(self) -> Layout:
        """What this rank holds."""
        return self._layout

    def local(self, shard: int) -> torch.Tensor:
        """A shard's own memory; may require gradients."""
        return self._shards[shard]

    def read_into(self, shard: int, src_offset: tuple[int, ...], shape: tuple[int, ...], out: torch.Tensor) -> None:
        """Copy a box of a shard into `out`."""
        if tuple(out.shape) != shape or out.dtype != self._shards[shard].dtype:
            raise ValueError(f"a box of shape {shape} does not go into {out.dtype} {tuple(out.shape)}")
        out.copy_(self._box(shard, src_offset, shape))

    def box_bytes(
        self, shard: int, src_offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> npt.NDArray[np.uint8] | None:
        """The bytes of a box of a shard; None on an accelerator, or where the last dimension is not contiguous."""
        box = self._box(shard, src_offset, shape)
        if box.device.type != "cpu" or box.is_neg():
            return None
        if box.dim() == 0:
            box = box.reshape(1)
        if box.stride(-1) != 1:
            return None
        # After `Tensor.numpy` the storage could never be resized again, as FSDP2 does when it reshards.
        data = cast("npt.NDArray[np.uint8]", np.from_dlpack(box.view(torch.uint8)))
        data.flags.writeable = False
        return data

    def _box(self, shard: int, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        return narrowed(self._shards[shard].detach(), offset, shape)


def named(
    weights: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
) -> tuple[tuple[str, ...], list[torch.Tensor]]:
    """Return names and tensors, in order. Raises `SourceError` for anything but pairs of a name and a tensor."""
    # Only the few classes that occur are checked. The many thousand tensors are looked at only to name the wrong one.
    if isinstance(weights, Mapping):
        names, tensors = tuple(weights), list(weights.values())
    else:
        pairs: list[Any] = list(weights)
        if not all(issubclass(kind, tuple | list) for kind in {*map(type, pairs)}) or {*map(len, pairs)} - {2}:
            odd = next(pair for pair in pairs if not isinstance(pair, tuple | list) or len(pair) != 2)
            raise SourceError(f"an iterable of weights gave {type(odd).__name__}, not a pair of name and tensor")
        names, tensors = tuple([pair[0] for pair in pairs]), [pair[1] for pair in pairs]
    if not all(issubclass(kind, str) for kind in {*map(type, names)}):
        raise SourceError(f"a tensor's name is {next(n for n in names if not isinstance(n, str))!r}, not a string")
    if not all(issubclass(kind, torch.Tensor) for kind in {*map(type, tensors)}):
        i = next(i for i, tensor in enumerate(tensors) if not isinstance(tensor, torch.Tensor))
        raise SourceError(f"{names[i]!r} is {type(tensors[i]).__name__}, not a tensor")
    return names, tensors
