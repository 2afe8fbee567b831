"""The interface of every transport: how the bytes of a bucket get from a slot here to a reader elsewhere.

One bucket, step by step (`slot` is an index into the sender's arena, every `deadline` absolute seconds of
`time.monotonic()`):

    sender                                            reader, named by a string such as "engine-a/0"
    offer(reader) ── opaque bytes ──────────────────▶ accept(offer)            once for each sender
    (trainer ranks fill the slot)
    export(slot, nbytes, sequence, readers)
      └─ one ticket for each reader ────────────────▶ receive(ticket) → lease  at most once for each ticket
    send(slot)        moves the bytes (broadcast)     (… reads lease.view …)
    wait_released(slot) ◀── fence ─────────────────── lease.release()
    (the slot may be filled again)

Two families share it, told apart by `BucketSender.mapped` and never by class:

* *mapped* (shm, CUDA IPC): the reader maps the sender's memory, `send` has nothing to do, and a reader is pending until
  it has released its lease;
* *broadcast* (gloo, NCCL): the reader receives into a slot of its own, and `receive` blocks until the sender is inside
  `send`. A reader is pending until `send` has ended; its lease is of its own slot. Sender and readers must take the
  buckets of one group in the same order.

Offers and tickets travel in control messages and are therefore bytes from outside: for bytes that are neither, `accept`
and `receive` raise `CodecError` and nothing else.

`close()` finishes. `abort()` returns at once, and calls that wait in other threads raise `TransportClosed`. After
either, every method but these two raises `TransportClosed`. Implementations pass
`weightsync.testing.check_transport`.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Self

from weightsync.errors import LocalProtocolError, TransportBroken, TransportClosed, TransportTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

__all__ = ["NO_ZERO", "BucketReceiver", "BucketSender", "Lease", "damaged", "seconds_left"]

NO_ZERO = 1  # stands for a checksum of 0 in a fence, where 0 means that nothing was read back
_POLL_FIRST = 50e-6  # seconds; a reader that only copies a small bucket is done by then
_LONGEST = 1e6  # seconds; bounds waits, so that no timer overflows
_POLL_LAST = 2e-3  # seconds; keeps a fence that stays closed for minutes at well under 1 % of a core


def seconds_left(deadline: float, what: str) -> float:
    """Return the seconds until `deadline`, more than 0. Raises `TransportTimeout` naming `what` if it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TransportTimeout(f"{what}: its deadline passed")
    return min(left, _LONGEST)


def damaged(sequence: int, found: int, exported: int) -> TransportBroken:
    """Make the error for bytes that differ from the exported ones."""
    return TransportBroken(
        f"bucket of sequence {sequence} differs from what was exported: its checksum is {found:016x}, not "
        f"{exported:016x}",
        hint="something wrote into the slot after it was filled",
    )


class Lease:
    """A reader's hold of one bucket's bytes. Release it as soon as they are read, and keep no view of it afterwards.

    A lease is a context manager; leaving the block releases it, whatever happened inside.
    """

    def __init__(
        self,
        *,
        sequence: int,
        nbytes: int,
        lent: memoryview | int | None,
        on_release: Callable[[], None],
        checksum: int | None = None,
    ) -> None:
        self.sequence = sequence
        self.nbytes = nbytes
        self.checksum = checksum  # of the exported bytes; None: not known
        self.read_back = 0  # checksum of the reader's copy: set by `confirm`, told to the sender on release
        self._lent = lent
        self._on_release: Callable[[], None] | None = on_release
        self._lock = threading.Lock()

    @property
    def view(self) -> memoryview:
        """The bytes in host memory: read-only, `nbytes` long.

        Raises `LocalProtocolError` after release, or if the bytes lie on a GPU.
        """
        if not isinstance(self._lent, memoryview):
            raise LocalProtocolError("this lease gives no host memory", hint="it was released, or lies on a GPU")
        return self._lent

    @property
    def address(self) -> int:
        """The bytes' address, on the reader's own GPU.

        Raises `LocalProtocolError` after release, or if the bytes lie in host memory.
        """
        if not isinstance(self._lent, int):
            raise LocalProtocolError("this lease gives no GPU memory", hint="it was released, or lies in host memory")
        return self._lent

    def confirm(self, found: int) -> None:
        """Report the checksum of the reader's own copy of the bytes. The sender learns it on release.

        Raises `TransportBroken` if it differs from the exported bytes' checksum.
        """
        self.read_back = found or NO_ZERO
        if self.checksum is not None and found != self.checksum:
            raise damaged(self.sequence, found, self.checksum)

    @property
    def released(self) -> bool:
        """Whether the bytes were given back."""
        return self._on_release is None

    def release(self) -> None:
        """Give the bytes back: they may change from now on. Releasing twice does nothing."""
        with self._lock:
            on_release, self._on_release = self._on_release, None
        if on_release is None:
            return
        lent, self._lent = self._lent, None
        try:
            if isinstance(lent, memoryview):
                lent.release()  # a use after release becomes an error, unless something was derived from the view
        except BufferError:
            pass  # a numpy array or tensor still refers to the view, and keeps its memory valid
        finally:
            on_release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class _End:
    """Base of senders and receivers: open until `close()` or `abort()`."""

    def __init__(self) -> None:
        self._ended = threading.Event()

    @property
    def closed(self) -> bool:
        """Whether `close()` or `abort()` was called."""
        return self._ended.is_set()

    def _check_open(self) -> None:
        if self._ended.is_set():
            raise TransportClosed(f"{type(self).__name__} was closed")


class BucketSender(_End, ABC):
    """The side that holds the bucket. Methods may be called from several threads; `export` serialises itself."""

    mapped: ClassVar[bool]  # true: readers map the sender's memory; false: all take part in each `send`, in one order

    @abstractmethod
    def offer(self, reader: str) -> bytes:
        """Return what `reader` needs to attach, as opaque bytes. Offering again to the same reader is allowed."""

    @abstractmethod
    def export(self, slot: int, nbytes: int, sequence: int, readers: Iterable[str]) -> dict[str, bytes]:
        """Give the first `nbytes` of `slot` to `readers`; returns the ticket of each.

        The checksum is computed here, once, unless it is known already, and travels in every ticket. `sequence` must be
        greater than the slot's previous one, whose readers must all be done; the same `sequence` adds readers. Raises
        `LocalProtocolError` otherwise, and for a reader to which nothing was offered.
        """

    @abstractmethod
    def send(self, slot: int, *, deadline: float) -> None:
        """Move the exported bytes of `slot`.

        A broadcast blocks until all readers took part; a mapped transport returns at once. Raises `TransportTimeout`,
        or `TransportBroken` if a peer is gone.
        """

    @abstractmethod
    def pending(self, slot: int) -> tuple[str, ...]:
        """Return readers that may still read from `slot`, in the order of their exports. Never blocks."""

    def damaged(self, slot: int) -> tuple[str, ...]:
        """Return readers that released the slot's current export but read back other bytes. Never blocks."""
        return ()

    @abstractmethod
    def revoke(self, slot: int, reader: str) -> None:
        """Stop waiting for `reader`, which is lost. Ignored if the reader has no export of this slot.

        A mapped transport also makes an unopened ticket worthless. A broadcast under way still needs the reader to take
        part; only `abort` ends it.
        """

    def wait_released(self, slot: int, *, deadline: float) -> None:
        """Return when no reader of `slot` is pending. Raises `TransportTimeout` naming the pending ones."""
        pause = _POLL_FIRST
        while waiting := self.pending(slot):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TransportTimeout(f"slot {slot} is still held by {', '.join(waiting)}")
            self._ended.wait(min(pause, left))
            pause = min(2 * pause, _POLL_LAST)

    @abstractmethod
    def close(self) -> None:
        """Release everything but the slots' memory, which its maker owns. Closing twice does nothing."""

    @abstractmethod
    def abort(self) -> None:
        """Close at once, from any thread. Calls that wait in other threads raise `TransportClosed`."""


class BucketReceiver(_End, ABC):
    """The side that reads the bucket. Methods may be called from several threads."""

    @abstractmethod
    def accept(self, offer: bytes, *, deadline: float) -> None:
        """Attach to the sender that made `offer`. Accepting the same offer again costs nothing.

        Raises `CodecError` for bytes that are no offer, `TransportBroken` if the sender they describe is gone or is not
        ours.
        """

    @abstractmethod
    def receive(self, ticket: bytes, *, deadline: float, verify: bool = True) -> Lease:
        """Open `ticket`, once, and return a lease of its bytes, with length and checksum verified.

        A checksum over tensors is not verified here: only the reader knows the tensors. With `verify=False` none is,
        because the reader copies the bytes anyway and calls `Lease.confirm` then.

        Raises `CodecError` for bytes that are no ticket. Raises `TransportBroken` for a ticket that was opened before
        or revoked, or is of a sender or reader not accepted here; and, naming sequence and both checksums, if the bytes
        differ from the exported ones.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the leases still held, and detach. The caller must not read their bytes any more.

        Closing twice does nothing.
        """

    @abstractmethod
    def abort(self) -> None:
        """Detach at once, from any thread. A `receive` that waits in another thread raises `TransportClosed`.

        Leases still held are *not* released, since their readers may be busy: each holder releases its own.
        """
