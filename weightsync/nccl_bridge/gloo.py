"""The communicator over gloo: bridges of several nodes broadcast slots in host memory to one another.

It constructs gloo's process group itself and leaves the default group of `torch.distributed` alone, so any number of
communicators, and a trainer's own groups, live beside one another. After any failed operation a communicator is broken
for good, on every member; the daemons form another generation.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from weightsync.errors import LocalProtocolError, TransportClosed
from weightsync.nccl_bridge.communicator import Communicator
from weightsync.nccl_bridge.rendezvous import translated
from weightsync.nccl_bridge.sockets import Sockets, Window, cut, forming
from weightsync.transports.base import seconds_left

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightsync.nccl_bridge.rendezvous import Meeting

__all__ = ["GlooCommunicator"]

logger = logging.getLogger(__name__)

_LONGEST_CLOSE = 60.0  # seconds for `close`, whatever its deadline
_CUT_AGAIN = 0.05  # seconds; an operation whose connections were cut ends within a millisecond


class GlooCommunicator(Communicator):
    """A communicator over gloo. Any thread may call `abort`."""

    def __init__(
        self, *, generation: int, rank: int, world: int, address: str, one_by_one: threading.Lock | None = None
    ) -> None:
        """`address` is this node's own; every socket of the communicator is bound to it. Call `join` next.

        Communicators of one process share `one_by_one`, which has them join one after the other: only then does each
        know its own sockets, and aborting one does not cut another's.
        """
        super().__init__(generation=generation, rank=rank, world=world, address=address)
        self._group: Any = None  # torch.distributed.ProcessGroupGloo
        self._one_by_one = one_by_one if one_by_one is not None else threading.Lock()
        self._window: Window | None = None  # the communicator's own sockets
        self._meeting: Sockets = frozenset()  # the rendezvous's sockets

    def join(self, rendezvous: Meeting, key: str, *, deadline: float) -> None:
        """Return when all members have joined. All give the same `key`."""
        what = f"joining generation {self.generation} as rank {self.rank} of {self.world}"
        import torch.distributed

        dist: Any = torch.distributed  # its stubs lack the names used here

        def check() -> None:
            self._check(what)
            seconds_left(deadline, what)

        with self._operation(what, deadline), forming(self._one_by_one, check) as self._window:
            if self._group is not None:
                raise LocalProtocolError(f"generation {self.generation} is joined already")
            self._meeting = rendezvous.sockets
            options = dist.ProcessGroupGloo._Options()
            options._timeout = timedelta(seconds=seconds_left(deadline, what))
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._address)]
            options._threads = 1  # enough, since operations come one at a time
            store = rendezvous.store(key, self.generation)
            self._group = dist.ProcessGroupGloo(store, self.rank, self.world, options)

    def broadcast(self, memory: memoryview, root: int, *, deadline: float) -> None:
        """Copy the root's `memory` into every other member's `memory`, which is writable and of the same length.

        gloo reads and writes `memory` itself, without a copy. Returns when this member's part is done: at the root,
        when the bytes are on their way and `memory` may change.
        """
        what = f"broadcast of {len(memory)} bytes from rank {root}, generation {self.generation}"
        if not 0 <= root < self.world:
            raise LocalProtocolError(f"{what}: there are {self.world} ranks")
        with self._operation(what, deadline):
            if self._group is None:
                raise LocalProtocolError(f"{what}: not joined")
            left = seconds_left(deadline, what)
            if len(memory) == 0 or self.world == 1:
                return
            import torch

            options = torch.distributed.BroadcastOptions()
            options.rootRank = root
            options.timeout = timedelta(seconds=left)
            self._group.broadcast([torch.frombuffer(memory, dtype=torch.uint8)], options).wait()

    def close(self, *, deadline: float) -> None:
        """Leave when the operation under way, if any, has ended; at `deadline` it is aborted.

        Members that are still in the communicator find it broken.
        """
        start = time.monotonic()
        taken = self._busy.acquire(timeout=min(max(0.0, deadline - start), _LONGEST_CLOSE))
        while not taken:
            self.abort()  # repeated, since a `join` under way may open more connections
            taken = self._busy.acquire(timeout=_CUT_AGAIN)
            if not taken and time.monotonic() - start > _LONGEST_CLOSE:
                logger.error("[generation=%d rank=%d] close.failed: gloo is wedged", self.generation, self.rank)
                return  # only the end of the process helps now, and the daemon decides on that
        try:
            self._closed.set()
            self._group = None  # joins gloo's threads, which are idle
        finally:
            self._busy.release()

    def abort(self) -> None:
        """End at once: an operation under way in another thread raises `TransportClosed`. Call `close` afterwards."""
        self._closed.set()
        window = self._window
        if window is not None and self._busy.locked():
            count = cut(window.sockets() | self._meeting)
            logger.info("[generation=%d rank=%d] abort.complete connections=%d", self.generation, self.rank, count)

    @contextmanager
    def _operation(self, what: str, deadline: float) -> Iterator[None]:
        with self._alone(what, deadline):
            try:
                yield
            except RuntimeError as error:
                if self._closed.is_set():
                    raise TransportClosed(f"{what}: aborted") from error
                broken = translated(error, what)
                self._broken = broken.message
                raise broken from error
