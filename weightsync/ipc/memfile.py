"""A file without a name, in host memory: others open it through the process that holds it, see `regions.py`.

Host memory of a process is its own; this is gone with the process, whatever becomes of that.
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
    """What these take, so that what follows them begins aligned."""
    return -(-nbytes // ALIGN) * ALIGN


class MemoryFile:
    """Of at least one byte, all of it allocated and mapped here; it never shrinks."""

    def __init__(self, nbytes: int) -> None:
        """Raises `OSError` where there is no room."""
        name = f"weightsync-{secrets.token_hex(8)}"
        self._fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(self._fd, 0, nbytes)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)  # nobody who has it mapped meets its end
            self.memory = mmap.mmap(self._fd, nbytes)
        except OSError:
            self.close()
            raise
        self.region = Region(nbytes=nbytes, fd=self._fd, name=name)

    def close(self) -> None:
        """Let go of it; who has it mapped keeps it until it is told of another."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
