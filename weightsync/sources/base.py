"""The protocol of sources: what a trainer rank's weights must offer to be pushed, wherever they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from weightsync.plan.manifest import Layout

__all__ = ["Source"]


@runtime_checkable
class Source(Protocol):
    """The weights that one rank holds. Boxes below are given by their offset in shard `shard` of `layout()`, and shape.

    A source may have a method `measure()`. It is called once in each push, before anything is read, in the thread that
    called `push_weights`. If it raises, the push ends on all ranks, with no engine touched.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of all shards together."""

    def layout(self) -> Layout:
        """Return what this rank holds. Raises `SourceError` if it cannot be described.

        It is the same object each time, also in other sources of tensors with the same shapes and, on this rank, the
        same element types.
        """

    def local(self, shard: int) -> torch.Tensor | None:
        """Return a shard's own memory, to be read where it lies; None for weights that lie in no tensor.

        It has the shard's shape, any strides and any device, and may require gradients. Its dtype is the trainer's,
        which may differ from the one sent. The call costs a look into a list.
        """

    def read_into(self, shard: int, src_offset: tuple[int, ...], shape: tuple[int, ...], out: torch.Tensor) -> None:
        """Copy a box into `out`, which has the layout's dtype, the box's shape and any strides.

        The copy is done when this returns. Raises `SourceError` if the bytes cannot be read any more.
        """

    def box_bytes(
        self, shard: int, src_offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> npt.NDArray[np.uint8] | None:
        """Return a read-only view of a box's bytes in host memory, as `fingerprint` takes them.

        It is uint8 of shape `(*shape[:-1], shape[-1] * itemsize)`, or `(itemsize,)` for a box of no dimensions. None if
        the bytes lie elsewhere or have no such view: the caller then reads them back from what `read_into` wrote.
        """
