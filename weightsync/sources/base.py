"""What a trainer rank's weights must offer to be pushed, wherever they lie."""

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
    """The weights one rank holds. Boxes below are given by offset in shard `shard` of `layout()`, and shape.

    A source may have a method `measure()`, which is called once in each push before anything is read, in the thread
    that called `push_weights`. What it raises ends the push on all ranks, with no engine touched.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of all shards together."""

    def layout(self) -> Layout:
        """What this rank holds; the same object each time, and in each source of tensors that are held alike: of the
        same shapes and, on this rank, element types. Raises `SourceError` if that cannot be described.
        """

    def local(self, shard: int) -> torch.Tensor | None:
        """A shard's own memory, to be read where it lies and as it is held: of the shard's shape, any strides, any
        device; in the trainer's dtype, which may be another than the one sent; it may require gradients. Costs a look
        into a list. None for weights that lie in no tensor.
        """

    def read_into(self, shard: int, src_offset: tuple[int, ...], shape: tuple[int, ...], out: torch.Tensor) -> None:
        """Copy a box into `out`, of the layout's dtype and the box's shape; any strides. Done when it returns.

        Raises `SourceError` if the bytes cannot be had any more.
        """

    def box_bytes(
        self, shard: int, src_offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> npt.NDArray[np.uint8] | None:
        """A read-only view of a box's bytes where they lie in host memory, as `fingerprint` takes them: uint8 of shape
        `(*shape[:-1], shape[-1] * itemsize)`, `(itemsize,)` for a box of no dimensions. None where they do not, or have
        no such view; then the caller reads them back from what `read_into` wrote.
        """
