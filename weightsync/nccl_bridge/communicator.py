"""Base of the communicators over gloo and NCCL: membership, one operation at a time, and being broken for good."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from weightsync.errors import LocalProtocolError, TransportBroken, TransportClosed, TransportTimeout
from weightsync.transports.base import seconds_left

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Communicator"]


class Communicator:
    """Member `rank` of the `world` members of one `generation`. One operation at a time."""

    def __init__(self, *, generation: int, rank: int, world: int, address: str) -> None:
        if not 0 <= rank < world:
            raise LocalProtocolError(f"rank {rank} is not in a world of {world}")
        self.generation = generation
        self.rank = rank
        self.world = world
        self._address = address
        self._busy = threading.Lock()
        self._closed = threading.Event()
        self._broken = ""  # why; the text only, since the error would keep its frames and their objects alive

    @property
    def closed(self) -> bool:
        """Whether `close` or `abort` was called."""
        return self._closed.is_set()

    @property
    def unusable(self) -> bool:
        """Whether it was closed, or has broken."""
        return self.closed or bool(self._broken)

    @contextmanager
    def _alone(self, what: str, deadline: float) -> Iterator[None]:
        """Hold the communicator for one operation. Raises `TransportTimeout` if another runs until the deadline."""
        self._check(what)
        if not self._busy.acquire(timeout=seconds_left(deadline, what)):
            raise TransportTimeout(f"{what}: another operation was under way until the deadline")
        try:
            self._check(what)
            yield
        finally:
            self._busy.release()

    def _check(self, what: str) -> None:
        if self._closed.is_set():
            raise TransportClosed(f"{what}: the communicator was closed")
        if self._broken:
            raise TransportBroken(
                f"{what}: the communicator is broken since: {self._broken}", hint="form a new generation"
            )
