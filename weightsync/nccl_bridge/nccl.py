"""The communicator over NCCL, for bridges whose slots lie on GPUs: one member on each node, one GPU each.

No call of NCCL waits here. After each call the member polls until the operation is done, a peer is gone, the
communicator was aborted, or the deadline has passed. An operation that ends early also ends the communicator, so that
none of its kernels stays on the GPU. The communicator is then broken for good, on every member; the daemons form
another generation.

Slots are not registered with NCCL. So only this member's own kernels write into its slots, and once those have ended no
late peer can.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsync.errors import (
    LocalProtocolError,
    TransportBroken,
    TransportClosed,
    TransportTimeout,
    WeightSyncError,
)
from weightsync.ipc.cuda import cupy
from weightsync.nccl_bridge.communicator import Communicator
from weightsync.nccl_bridge.rendezvous import translated
from weightsync.nccl_bridge.terms import agree, nccl, prepare
from weightsync.transports.base import seconds_left
from weightsync.transports.nccl import Piece

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from weightsync.nccl_bridge.rendezvous import Meeting

__all__ = ["NcclCommunicator", "Tokens"]

logger = logging.getLogger(__name__)

_POLL_FIRST = 10e-6  # seconds between two polls of an operation, growing to …
_POLL_LAST = 500e-6  # … this
_POLL_AGREED = 2e-3  # seconds between two polls of the store
_GROUP = 512  # broadcasts launched together: NCCL plans them into few kernels
_AHEAD = 32  # broadcasts of a stream that are queued at a time
_IDLE = 5.0  # seconds for the GPU to end what an aborted communicator was doing
_LONGEST_CLOSE = 60.0  # seconds for `close`, whatever its deadline
_NOT_READY = 600  # cudaErrorNotReady


class NcclCommunicator(Communicator):
    """A communicator over NCCL. Any thread may call `abort`."""

    def __init__(self, *, generation: int, rank: int, world: int, address: str, device: int = 0) -> None:
        """`address` is this node's own; NCCL uses its network interface. Call `join` next."""
        super().__init__(generation=generation, rank=rank, world=world, address=address)
        self._device = device
        self._communicator: Any = None
        self._stream: Any = None
        self._tokens: Tokens | None = None

    def join(self, rendezvous: Meeting, key: str, *, deadline: float) -> None:
        """Return when all members have joined. All give the same `key`.

        Raises `ConfigError` if NCCL is set up differently here than at rank 0.
        """
        what = f"joining generation {self.generation} as rank {self.rank} of {self.world}"
        with self._operation(what, deadline):
            if self._communicator is not None:
                raise LocalProtocolError(f"generation {self.generation} is joined already")
            prepare(self._address)
            store = rendezvous.store(key, self.generation)
            unique_id = agree(store, self.rank, self.world, lambda: self._pause(_POLL_AGREED, what, deadline))
            self._stream = cupy().cuda.Stream(non_blocking=True)
            self._tokens = Tokens(self.world)
            self._communicator = nccl().begin(self.world, unique_id, self.rank)
            self._wait(what, deadline)

    def broadcast(self, pieces: Sequence[Piece], token: int, *, deadline: float) -> None:
        """Return when this member has the bytes of all `pieces`; for its own pieces, when their memory may change.

        All members give pieces of the same roots and sizes, in the same order, and the same `token`, which no other
        broadcast has. Raises `TransportBroken` if a root was in another broadcast.
        """
        nbytes = sum(piece.nbytes for piece in pieces)
        what = f"broadcast of {nbytes} bytes in {len(pieces)} pieces, generation {self.generation}"
        if strangers := {piece.root for piece in pieces if not 0 <= piece.root < self.world}:
            raise LocalProtocolError(f"{what}: there is no rank {min(strangers)}, only {self.world}")
        with self._operation(what, deadline):
            tokens = self._tokens
            if self._communicator is None or tokens is None:
                raise LocalProtocolError(f"{what}: not joined")
            if self.world == 1:
                return
            roots = sorted({piece.root for piece in pieces})
            tokens.send(token, self.rank, self._stream)
            told = [Piece(root, tokens.address(root), tokens.nbytes) for root in roots]
            everything = [*told, *(piece for piece in pieces if piece.nbytes)]
            for start in range(0, len(everything), _GROUP):
                self._launch(everything[start : start + _GROUP], what, deadline)
            tokens.fetch(self._stream)
            self._wait(what, deadline, self._drained)
            if others := [root for root in roots if tokens.of(root) != token]:
                raise TransportBroken(f"{what}: rank {others[0]} is in another one: members take them in other orders")

    def stream(
        self,
        pieces: Sequence[tuple[int, int]],
        token: int,
        root: int,
        *,
        before: Callable[[int, int], None],
        after: Callable[[int, int], None],
        settled: Callable[[], bool],
        deadline: float,
    ) -> None:
        """Broadcast `pieces` (address, bytes) from `root` one after the other, without a host wait in between.

        Sizes are the same at every member. `before` and `after` queue the work that each piece needs, given its number
        and the address of the stream it travels on. Returns when that work has ended too and `settled` is true. All
        members give the same `token`, which is compared before the first piece. Raises as `broadcast`.
        """
        what = f"stream of {sum(nbytes for _, nbytes in pieces)} bytes in {len(pieces)} pieces from rank {root}"
        self.broadcast([Piece(root, 0, 0)], token, deadline=deadline)
        ahead: deque[Any] = deque()
        with self._operation(what, deadline):
            for number, (address, nbytes) in enumerate(pieces):
                before(number, self._stream.ptr)
                self._launch([Piece(root, address, nbytes)], what, deadline)
                after(number, self._stream.ptr)
                ahead.append(self._stream.record())
                if len(ahead) > _AHEAD:  # a launch into a full stream would block the host, without a deadline
                    self._wait(what, deadline, partial(_passed, ahead.popleft()))
            self._wait(what, deadline, lambda: self._drained() and settled())

    def close(self, *, deadline: float) -> None:
        """Leave when the operation under way, if any, has ended; at `deadline` it is aborted.

        Members that are still in the communicator find it broken. Raises `TransportTimeout` if NCCL does not return:
        only the end of the process helps then.
        """
        start = time.monotonic()
        if not self._busy.acquire(timeout=min(max(0.0, deadline - start), _LONGEST_CLOSE)):
            self.abort()
            if not self._busy.acquire(timeout=_LONGEST_CLOSE):
                raise TransportTimeout(f"generation {self.generation}: NCCL does not return")
        try:
            self._closed.set()
            self._end()
        finally:
            self._busy.release()

    def abort(self) -> None:
        """End at once: an operation under way in another thread raises `TransportClosed`. Call `close` afterwards."""
        self._closed.set()

    def _launch(self, pieces: Sequence[Piece], what: str, deadline: float) -> None:
        library = nccl()
        library.group_start()
        try:
            for root, address, nbytes in pieces:
                library.broadcast(self._communicator, address, nbytes, root, self._stream.ptr)
        finally:
            library.group_end()
        self._wait(what, deadline)

    def _wait(self, what: str, deadline: float, done: Callable[[], bool] = lambda: True) -> None:
        """Wait until NCCL is done on the host and `done` returns true. Raises `TransportBroken` if a peer has ended."""
        pause = _POLL_FIRST
        while not (nccl().ready(self._communicator) and done()):
            self._pause(pause, what, deadline)
            pause = min(1.2 * pause, _POLL_LAST)

    def _drained(self) -> bool:
        """Whether the GPU has done all work on this communicator's stream."""
        return _idle(self._stream)

    def _pause(self, seconds: float, what: str, deadline: float) -> None:
        if self._closed.wait(seconds):
            raise TransportClosed(f"{what}: aborted")
        seconds_left(deadline, what)

    @contextmanager
    def _operation(self, what: str, deadline: float) -> Iterator[None]:
        with self._alone(what, deadline):
            try:
                with cupy().cuda.Device(self._device):
                    yield
            except LocalProtocolError:
                raise
            except WeightSyncError as error:
                self._broken = error.message
                self._end()
                raise
            except RuntimeError as error:  # from CUDA, or from the store
                broken = translated(error, what)
                self._broken = broken.message
                self._end()
                raise broken from error

    def _end(self) -> None:
        """Abort it and wait until its kernels have left the GPU. Raises `TransportTimeout` if they do not."""
        communicator, self._communicator = self._communicator, None
        with cupy().cuda.Device(self._device):
            if communicator is not None:
                start = time.monotonic()
                nccl().abort(communicator)
                logger.info(
                    "[generation=%d rank=%d] left seconds=%.3f", self.generation, self.rank, time.monotonic() - start
                )
            if self._stream is None:
                return
            until = time.monotonic() + _IDLE
            while not _idle(self._stream):
                if time.monotonic() > until:
                    raise TransportTimeout(f"generation {self.generation}: its kernels did not end in {_IDLE:g} s")
                threading.Event().wait(_POLL_LAST)
            self._stream = None
            if self._tokens is not None:
                self._tokens.free()
                self._tokens = None


def _idle(stream: Any) -> bool:
    """Whether all work given to a stream is done. Raises `TransportBroken` if its GPU has failed."""
    return _is_past(cupy().cuda.runtime.streamQuery(stream.ptr))  # cupy's own `done` takes an error for "not yet"


def _passed(event: Any) -> bool:
    """Whether all work given to the stream before an event is done. Raises `TransportBroken` if its GPU has failed."""
    return _is_past(cupy().cuda.runtime.eventQuery(event.ptr))


def _is_past(status: int) -> bool:
    if status not in (0, _NOT_READY):
        raise TransportBroken(f"CUDA error {status} in the kernels of a communicator")
    return status == 0


class Tokens:
    """One word for each member, on the GPU and in host memory: a root sends its word along with its bytes."""

    nbytes = 8

    def __init__(self, world: int) -> None:
        c = cupy().cuda
        self._device = c.runtime.malloc(self.nbytes * world)
        self._pinned = c.alloc_pinned_memory(self.nbytes * world)
        self._host = np.frombuffer(self._pinned, dtype=np.uint64, count=world)

    def address(self, root: int) -> int:
        """Address of a member's word on the GPU."""
        return int(self._device) + self.nbytes * root

    def of(self, root: int) -> int:
        """The token that `root` sent, as `fetch` copied it."""
        return int(self._host[root])

    def send(self, token: int, rank: int, stream: Any) -> None:
        """Put this member's own token in place, on the stream."""
        self._host[rank] = token
        self._copy(self.address(rank), self._host[rank:].ctypes.data, self.nbytes, stream)

    def fetch(self, stream: Any) -> None:
        """Copy all tokens to host memory, on the stream."""
        self._copy(self._host.ctypes.data, int(self._device), self._host.nbytes, stream)

    def free(self) -> None:
        """Free the GPU memory. Nothing that uses it may still run."""
        cupy().cuda.runtime.free(self._device)

    @staticmethod
    def _copy(to: int, from_: int, nbytes: int, stream: Any) -> None:
        runtime = cupy().cuda.runtime
        runtime.memcpyAsync(to, from_, nbytes, runtime.memcpyDefault, stream.ptr)
