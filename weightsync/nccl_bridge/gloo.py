"""The communicator: bridges of several nodes that broadcast slots to one another, over gloo.

A process group of our own is made from its parts: the default group of `torch.distributed` is not touched, so that any
number of communicators, and a trainer's own groups, live beside one another. After any failed operation a communicator
is broken for good, on every member; the daemons form another generation.
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
    """See the base class; `abort` from any thread."""

    def __init__(
        self, *, generation: int, rank: int, world: int, address: str, one_by_one: threading.Lock | None = None
    ) -> None:
        """`address` is this node's own, to which every socket of the communicator is bound. Call `join` next. Those of
        one process that share `one_by_one` join one after the other, so that the end of one is not that of another.
        """
        super().__init__(generation=generation, rank=rank, world=world, address=address)
        self._group: Any = None  # torch.distributed.ProcessGroupGloo
        self._one_by_one = one_by_one if one_by_one is not None else threading.Lock()
        self._window: Window | None = None  # of the sockets that are ours …
        self._meeting: Sockets = frozenset()  # … and of those by which the members meet

    def join(self, rendezvous: Meeting, key: str, *, deadline: float) -> None:
        """Return when all members have joined. They all give the same `key`."""
        what = f"joining generation {self.generation} as rank {self.rank} of {self.world}"
        import torch.distributed

        dist: Any = torch.distributed  # its stubs leave out what is needed here

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
            options._threads = 1  # operations come one at a time
            store = rendezvous.store(key, self.generation)
            self._group = dist.ProcessGroupGloo(store, self.rank, self.world, options)

    def broadcast(self, memory: memoryview, root: int, *, deadline: float) -> None:
        """Copy `memory` of the member `root` into that of every other, which is writable and as long.

        Straight out of and into `memory`. Returns when this member's part is done: at the root, when the bytes are on
        their way and `memory` may change.
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
        """Leave, after the operation under way, if there is one, has ended; by `deadline` at the latest, by force.

        The other members see it as broken if they are still in it.
        """
        start = time.monotonic()
        taken = self._busy.acquire(timeout=min(max(0.0, deadline - start), _LONGEST_CLOSE))
        while not taken:
            self.abort()  # again and again, since a `join` may be about to connect
            taken = self._busy.acquire(timeout=_CUT_AGAIN)
            if not taken and time.monotonic() - start > _LONGEST_CLOSE:
                logger.error("[generation=%d rank=%d] close.failed: gloo is wedged", self.generation, self.rank)
                return  # nothing but the end of the process helps, and that is the daemon's to decide
        try:
            self._closed.set()
            self._group = None  # joins gloo's threads, which have nothing to do
        finally:
            self._busy.release()

    def abort(self) -> None:
        """End it now: an operation under way in another thread raises `TransportClosed`. `close` afterwards."""
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
