"""A file without a name, in host memory. Other processes open it through the process that holds it; see `regions.py`.

No process can map another's ordinary host memory. The file vanishes with its process, however that ends.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets

from weightsync.plan.exposure import Region

__all__ = ["ALIGN", "MemoryFile", "aligned"]

ALIGN = 64  # bytes


def aligned(nbytes: int) -> int:
    """Return `nbytes` rounded up to a multiple of `ALIGN`."""
    return -(-nbytes // ALIGN) * ALIGN


class MemoryFile:
    """A file of at least one byte, all of it allocated and mapped here. It never shrinks."""

    def __init__(self, nbytes: int) -> None:
        """Raises `OSError` if there is no room."""
        name = f"weightsync-{secrets.token_hex(8)}"
        self._fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(self._fd, 0, nbytes)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)  # else mappings of it may end in a SIGBUS
            self.memory = mmap.mmap(self._fd, nbytes)
        except OSError:
            self.close()
            raise
        self.region = Region(nbytes=nbytes, fd=self._fd, name=name)

    def close(self) -> None:
        """Let go of the file. Processes that have it mapped keep it until they are told of another."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
