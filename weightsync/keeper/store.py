"""The weights of one push, whole, in host memory; and those of the next while they come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from weightsync.adapters.worker import SlotReader
from weightsync.errors import LocalProtocolError
from weightsync.sources.parts import Part, PartSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.plan.table import TensorTable

__all__ = ["Kept", "Store"]


@dataclass
class Kept:
    """The tensors of one push."""

    version: int
    table: TensorTable
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return int(self.table.sizes.sum())

    def source(self) -> PartSource:
        """All of it, to be pushed again; tied tensors under all their names."""
        table = self.table
        parts = []
        for name, dtype, shape in zip(table.names, table.dtypes, table.shapes, strict=True):
            data = self.tensors.get(name)
            if data is None:  # of no elements: there was nothing to send
                data = torch.empty(shape, dtype=getattr(torch, dtype))
            parts.append(Part(name, shape, (0,) * len(shape), data))
        return PartSource(parts, table.aliases)


class Store:
    """See the module. An update replaces what is kept when it is committed, and leaves no trace otherwise: so there is
    room for two while one is under way.
    """

    def __init__(self) -> None:
        self.kept: Kept | None = None
        self._reader = SlotReader("cpu")
        self._coming: Kept | None = None
        self._whole = False

    def begin(self, version: int, manifest: bytes, offers: Sequence[bytes], *, deadline: float) -> None:
        """Open an update. Raises as `SlotReader.begin`."""
        self._coming, self._whole = None, False
        self._reader.begin(manifest, offers, deadline=deadline)
        self._coming = Kept(version, self._reader.manifest.tensors)

    def load(self, bucket: int, ticket: bytes, *, deadline: float) -> None:
        """Copy a bucket. Raises as `SlotReader.read`."""
        self._open().tensors.update(self._reader.read(bucket, ticket, deadline=deadline).tensors())

    def finish(self) -> None:
        """Raise `LocalProtocolError` naming the first tensor that did not come whole."""
        self._open()
        self._reader.finish()
        self._whole = True

    def commit(self) -> None:
        """Keep the update that was finished. Raises `LocalProtocolError` where none was."""
        if not self._whole:
            raise LocalProtocolError("no update was finished")
        self.kept, self._coming, self._whole = self._open(), None, False

    def _open(self) -> Kept:
        if self._coming is None:
            raise LocalProtocolError("no update is open", hint="begin first")
        return self._coming
