"""The weights of the last push in host memory, and those of the next push while they come."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from weightsync.adapters.worker import SlotReader
from weightsync.errors import EngineError, LocalProtocolError
from weightsync.keeper.memory import LockedMemory
from weightsync.plan.manifest import Manifest
from weightsync.sources.parts import Part, PartSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.device.fetching import FetchedBuckets
    from weightsync.plan.table import TensorTable

__all__ = ["Kept", "Store"]


@dataclass
class Kept:
    """A model's tensors as of one version."""

    version: int
    aliases: dict[str, str]  # name of a tied tensor → name under which it was sent
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    whole: bool = False  # known to be all that an engine needs

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def source(self) -> PartSource:
        """Return all tensors as a source, to push them again; tied tensors under all their names."""
        parts = [Part(name, tuple(t.shape), (0,) * t.dim(), t) for name, t in self.tensors.items()]
        return PartSource(parts, self.aliases.items())


class Store:
    """The kept version and the update under way.

    An update replaces the kept version when it is committed, and leaves no trace otherwise. So memory holds two
    versions while an update is under way.
    """

    def __init__(self, gpu: int | None = None) -> None:
        """`gpu` is the device of this process that reads slots on GPUs; None: slots lie in host memory."""
        self.kept: Kept | None = None
        self._gpu = gpu
        self._locked = LockedMemory(gpu) if gpu is not None else None
        self._reader = SlotReader("cpu", through=partial(self._fetched, gpu) if gpu is not None else None)
        self._manifest: tuple[bytes, Manifest] | None = None  # the last one, packed and unpacked
        self._coming: Kept | None = None
        self._table: TensorTable | None = None  # tensors of the open update
        self._after: int | None = None
        self._finished = False

    def warm(self) -> None:
        """Get the GPU ready. Raises torch's errors."""
        if self._gpu is not None:
            self._fetched(self._gpu).warm()

    def begin(
        self, version: int, after: int | None, manifest: bytes, offers: Sequence[bytes], *, deadline: float
    ) -> None:
        """Open an update. Raises as `SlotReader.begin`, and `EngineError` if there is no room for it."""
        self._coming, self._finished, self._after = None, False, after
        if self._manifest is None or self._manifest[0] != manifest:
            self._manifest = manifest, Manifest.unpack(manifest)
        coming = self._manifest[1]  # the same object for the same layout: the reader reuses the GPU's tables for it
        free = available() + (self._locked.spare if self._locked is not None else 0)
        self._reader.begin(coming, offers, deadline=deadline)
        if coming.nbytes > free:
            raise EngineError(
                f"{coming.nbytes / 1e9:.1f} GB do not fit into host memory, of which {free / 1e9:.1f} GB are free",
                hint='node.retain = "host" takes the size of the model, and twice that during a push; with slots on '
                "GPUs twice that from the second push on",
            )
        self._table = coming.tensors
        self._coming = Kept(version, dict(coming.tensors.aliases))

    def load(self, bucket: int, ticket: bytes, *, deadline: float) -> None:
        """Copy a bucket. Raises as `SlotReader.read`."""
        self._open().tensors.update(self._reader.read(bucket, ticket, deadline=deadline).tensors())

    def finish(self) -> None:
        """Raise `LocalProtocolError` naming the first tensor that did not come whole."""
        coming, table = self._open(), self._table
        assert table is not None, "an update is open"
        self._reader.finish()
        for name, dtype, shape in zip(table.names, table.dtypes, table.shapes, strict=True):
            if name not in coming.tensors:  # it has no elements, so there was nothing to send
                coming.tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype))
        self._finished = True

    def commit(self) -> None:
        """Keep the finished update. Raises `LocalProtocolError` if none was finished.

        Tensors that the update did not bring stay if the kept version is the one that was committed last before it.
        """
        if not self._finished:
            raise LocalProtocolError("no update was finished")
        before, now = self.kept, self._open()
        if before is not None and before.version == self._after:
            there = now.tensors.keys() | now.aliases.keys()
            now.tensors = {n: t for n, t in before.tensors.items() if n not in there} | now.tensors
            now.aliases = {
                n: to for n, to in before.aliases.items() if n not in there and to in now.tensors
            } | now.aliases
            now.whole = before.whole
        self.kept, self._coming, self._finished = now, None, False

    def settle(self, *, whole: int | None) -> None:
        """End a push. `whole` is its version, if it was committed and brought all that engines hold.

        Otherwise the kept version is whole only if it was before, or if the version that it was laid over was.
        """
        self._coming, self._finished = None, False
        if self.kept is not None and self.kept.version == whole:
            self.kept.whole = True

    def _fetched(self, gpu: int) -> FetchedBuckets:
        from weightsync.device.fetching import FetchedBuckets

        assert self._locked is not None, "there is a GPU"
        return FetchedBuckets(torch.device("cuda", gpu), self._locked.take)

    def _open(self) -> Kept:
        if self._coming is None:
            raise LocalProtocolError("no update is open", hint="begin first")
        return self._coming


def available() -> int:
    """Return the bytes of host memory that the kernel estimates to be available."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return sys.maxsize
