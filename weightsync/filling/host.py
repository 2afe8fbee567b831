"""Fills slots in host memory: torch copies, numpy fingerprints, both without the GIL."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import torch

from weightsync.filling.program import Filled
from weightsync.fingerprint import fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np

    from weightsync.filling.program import Program, Write
    from weightsync.ipc.arena import Arena
    from weightsync.sources.base import Source

__all__ = ["HostFill"]

_FINGERPRINT = 600.0  # seconds for one bucket: a bound, not an expectation
_MASK = 2**64 - 1


class _Pool:
    """One thread, started with its first work; a forked child begins with none."""

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="weightsync-fingerprint")


_POOL = _Pool()
os.register_at_fork(after_in_child=_POOL.__init__)  # type: ignore[misc]


class HostFill:
    """The filling of one push. A bucket is full when `begin` returns."""

    def __init__(self, source: Source, program: Program, arenas: Sequence[Arena]) -> None:
        self._source, self._program, self._arenas = source, program, arenas
        self._done: list[Filled] = []

    @property
    def busy(self) -> bool:
        """Whether a bucket was begun that `finished` has not yielded."""
        return bool(self._done)

    def begin(self, bucket: int, bridge: int, slot: int) -> None:
        """Write this rank's parts of a bucket into a slot. Raises `SourceError`."""
        memory = torch.frombuffer(self._arenas[bridge].slot(slot), dtype=torch.uint8)
        writes = self._program.writes[bucket]
        # numpy and torch both release the GIL: one core fingerprints a bucket while another copies it
        ahead = _POOL.executor.submit(lambda: [self._fingerprint(write) for write in writes])
        try:
            copied = [self._write(memory, write) for write in writes]
        finally:  # a failed push, too, must not read weights after it has returned
            wait([ahead], _FINGERPRINT)
        sums: dict[int, int] = {}
        for write, out, found in zip(writes, copied, ahead.result(0), strict=True):
            part = _fingerprint(_bytes_of(out), write) if found is None else found
            sums[write.tensor] = (sums.get(write.tensor, 0) + part) & _MASK
        self._done.append(Filled(bucket, sum(write.nbytes for write in writes), sums))

    def finished(self) -> Iterator[Filled]:
        """Yield each full bucket once."""
        while self._done:
            yield self._done.pop(0)

    def close(self, *, deadline: float) -> None:
        """Do nothing: no work is under way between calls."""

    def _write(self, slot: torch.Tensor, write: Write) -> torch.Tensor:
        """Copy one part into the slot. Returns the part as a view of the slot."""
        out = slot[write.begin : write.end].view(write.dtype).view(write.piece_shape)
        if not write.whole_piece:
            for dim, (start, length) in enumerate(zip(write.dst_offset, write.shape, strict=True)):
                out = out.narrow(dim, start, length)
        self._source.read_into(write.shard, write.src_offset, write.shape, out)
        return out

    def _fingerprint(self, write: Write) -> int | None:
        """Fingerprint the source's own bytes of a part. Returns None if they do not lie in host memory."""
        data = self._source.box_bytes(write.shard, write.src_offset, write.shape)
        return None if data is None else _fingerprint(data, write)


def _fingerprint(data: np.ndarray[Any, Any], write: Write) -> int:
    return fingerprint(
        data,
        itemsize=write.itemsize,
        global_shape=write.global_shape,
        offset=write.global_offset,
        shape=write.shape,
    )


def _bytes_of(out: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return the bytes of a tensor in host memory, row-major. Copies only a strided tensor."""
    return out.contiguous().view(-1).view(torch.uint8).numpy()
