"""Page-locked host memory for buckets that come from a GPU, reused from push to push.

A copy engine reaches the speed of its link only if the driver has locked the memory, and locking takes longer than the
copy. So memory that a push no longer needs stays locked for the next one. A bucket's memory is spare once no tensor
uses it. If no spare block has the right size, as much spare memory is freed as is newly taken. So changing layouts take
no more than one layout does: twice the model, one copy kept and one coming.
"""

from __future__ import annotations

import logging
import mmap
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from weightsync.ipc.cuda import lock_pages, unlock_pages

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

__all__ = ["LockedMemory"]

logger = logging.getLogger(__name__)

_PAGE = 2 << 20  # bytes of a huge page: fewer pages to lock, and to map


class _Block(NamedTuple):
    """A mapping of this process's own."""

    bytes: npt.NDArray[np.uint8]
    locked: bool

    @property
    def address(self) -> int:
        return int(self.bytes.ctypes.data)


class LockedMemory:
    """A pool of page-locked blocks, see the module. For one thread."""

    def __init__(
        self,
        device: int,
        lock: Callable[[int, int, int], str] = lock_pages,
        unlock: Callable[[int, int], None] = unlock_pages,
    ) -> None:
        """`device` is the GPU of this process that copies into this memory; `lock` and `unlock` are the driver's."""
        self._device = device
        self._lock, self._unlock = lock, unlock
        self._spare: list[_Block] = []  # the block given back first comes first
        self._refused = False

    @property
    def spare(self) -> int:
        """Bytes that this process has mapped and no tensor uses."""
        return sum(block.bytes.nbytes for block in self._spare)

    def take(self, nbytes: int) -> torch.Tensor:
        """Return uint8 [nbytes] of any content. Its memory is spare again when the last tensor that uses it is gone."""
        size = max(1, -(-nbytes // _PAGE)) * _PAGE
        at = next((at for at, block in enumerate(self._spare) if block.bytes.nbytes == size), None)
        if at is not None:
            block = self._spare.pop(at)
        else:
            self._make_room(size)
            block = self._map(size)
        lent = block.bytes[:nbytes]  # a new array object, which torch holds as long as a tensor uses it
        weakref.finalize(lent, self._give_back, block).atexit = False
        return torch.from_numpy(lent)

    def _give_back(self, block: _Block) -> None:
        self._spare.append(block)

    def _make_room(self, nbytes: int) -> None:
        while self._spare and nbytes > 0:
            block = self._spare.pop(0)
            nbytes -= block.bytes.nbytes
            if block.locked:
                self._unlock(block.address, self._device)

    def _map(self, size: int) -> _Block:
        memory: Any = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        whole = np.frombuffer(memory, dtype=np.uint8)  # unmapped with the last array over it
        why_not = self._lock(int(whole.ctypes.data), size, self._device)
        if why_not and not self._refused:
            self._refused = True
            logger.warning("host memory cannot be locked, and is copied to more slowly: %s", why_not)
        return _Block(whole, locked=not why_not)
