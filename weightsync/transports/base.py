"""The interface of every transport: how the bytes of a bucket get from a slot here to a reader elsewhere.

One bucket, step by step (`slot` is an index into the sender's arena, every `deadline` absolute seconds of
`time.monotonic()`):

    sender                                            reader, named by a string such as "engine-a/0"
    offer(reader) ── opaque bytes ──────────────────▶ accept(offer)            once for each sender
    (somebody fills the slot)
    export(slot, nbytes, sequence, readers)
      └─ one ticket for each reader ────────────────▶ receive(ticket) → lease  at most once for each ticket
    send(slot)        moves the bytes (broadcast)     (… reads lease.view …)
    wait_released(slot) ◀── fence ─────────────────── lease.release()
    (the slot may be filled again)

Two families share it, told apart by `BucketSender.mapped` and never by class:

* *mapped* (shm, CUDA IPC): the reader maps the sender's memory, `send` has nothing to do, and a reader is pending until
  it released its lease;
* *broadcast* (gloo, NCCL): the reader owns a slot of its own and `receive` blocks until the sender is inside `send`; a
  reader is pending until `send` ended, and its lease is of its own slot. Sender and readers must take the buckets of
  one group in the same order.

Offers and tickets are carried by control messages and are therefore bytes from outside: `accept` and `receive` raise
`CodecError`, and nothing else, for bytes that are none of ours.

`close()` finishes, `abort()` returns at once and makes calls that wait in other threads raise `TransportClosed`. After
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

NO_ZERO = 1  # what a checksum of 0 is told as in a fence, where 0 means that nobody looked
_POLL_FIRST = 50e-6  # seconds; a reader that only copies a small bucket is done by then
_LONGEST = 1e6  # seconds; what is waited for longer may as well time out, and no timer overflows
_POLL_LAST = 2e-3  # seconds; keeps a fence that stays closed for minutes at well under 1 % of a core


def seconds_left(deadline: float, what: str) -> float:
    """Seconds until `deadline`, more than 0. Raises `TransportTimeout` naming `what` when it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TransportTimeout(f"{what}: its deadline passed")
    return min(left, _LONGEST)


def damaged(sequence: int, found: int, exported: int) -> TransportBroken:
    """The error for bytes that are not those that were exported."""
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
        self.checksum = checksum  # of what was exported; None: not known
        self.read_back = 0  # of the bytes as the reader has them: set by `confirm`, told to the sender by the release
        self._lent = lent
        self._on_release: Callable[[], None] | None = on_release
        self._lock = threading.Lock()

    @property
    def view(self) -> memoryview:
        """The bytes in host memory: read-only, `nbytes` long. Raises `LocalProtocolError` after release, or when the
        bytes lie on a GPU."""
        if not isinstance(self._lent, memoryview):
            raise LocalProtocolError("this lease gives no host memory", hint="it was released, or lies on a GPU")
        return self._lent

    @property
    def address(self) -> int:
        """Where the reader's own GPU reads the bytes. Raises `LocalProtocolError` after release, or when they lie in
        host memory."""
        if not isinstance(self._lent, int):
            raise LocalProtocolError("this lease gives no GPU memory", hint="it was released, or lies in host memory")
        return self._lent

    def confirm(self, found: int) -> None:
        """Tell what checksum the reader's own copy of the bytes has; the sender hears of it on release.

        Raises `TransportBroken` if it is not that of what was exported.
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
                lent.release()  # turns a use after release into an error, where nothing was derived from the view
        except BufferError:
            pass  # a numpy array or tensor still refers to it: it stays valid memory until that is dropped
        finally:
            on_release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class _End:
    """What senders and receivers share: being open until `close()` or `abort()`."""

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

    mapped: ClassVar[bool]  # readers map the sender's memory; else all of them take part in `send`, in one order

    @abstractmethod
    def offer(self, reader: str) -> bytes:
        """What `reader` needs to attach, as opaque bytes. Offering again to the same reader is allowed."""

    @abstractmethod
    def export(self, slot: int, nbytes: int, sequence: int, readers: Iterable[str]) -> dict[str, bytes]:
        """Give the first `nbytes` of `slot` to `readers`; returns the ticket of each.

        The checksum is computed here, once, unless it is known already, and travels in every ticket. `sequence` must be
        greater than that of the slot's previous export, whose readers must all be done; or the same, to add readers to
        it. Raises `LocalProtocolError` otherwise, and for a reader to which nothing was offered.
        """

    @abstractmethod
    def send(self, slot: int, *, deadline: float) -> None:
        """Move the exported bytes of `slot`. Blocks until all readers of a broadcast took part; where they map it,
        returns at once. Raises `TransportTimeout`, or `TransportBroken` when a peer is gone."""

    @abstractmethod
    def pending(self, slot: int) -> tuple[str, ...]:
        """Readers that may still read from `slot`, in the order in which they were exported to. Never blocks."""

    def damaged(self, slot: int) -> tuple[str, ...]:
        """Readers of the slot's current export that released it and had read back something else. Never blocks."""
        return ()

    @abstractmethod
    def revoke(self, slot: int, reader: str) -> None:
        """Stop waiting for `reader`, which is lost; one that has nothing of this slot is ignored. Where it maps the
        slot, its ticket is also made worthless if it was not opened; a broadcast still needs it to take part, and is
        ended by `abort`."""

    def wait_released(self, slot: int, *, deadline: float) -> None:
        """Return when no reader of `slot` is pending. Raises `TransportTimeout` naming those that are."""
        pause = _POLL_FIRST
        while waiting := self.pending(slot):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TransportTimeout(f"slot {slot} is still held by {', '.join(waiting)}")
            self._ended.wait(min(pause, left))
            pause = min(2 * pause, _POLL_LAST)

    @abstractmethod
    def close(self) -> None:
        """Let go of everything. The slots' memory belongs to whoever made it and stays. Closing twice does nothing."""

    @abstractmethod
    def abort(self) -> None:
        """Like `close`, at once, from any thread; what waits elsewhere raises `TransportClosed`."""


class BucketReceiver(_End, ABC):
    """The side that reads the bucket. Methods may be called from several threads."""

    @abstractmethod
    def accept(self, offer: bytes, *, deadline: float) -> None:
        """Attach to the sender that made `offer`. Accepting the same offer again costs nothing.

        Raises `CodecError` for bytes that are no offer, `TransportBroken` when what they describe is not there (any
        more) or is not ours.
        """

    @abstractmethod
    def receive(self, ticket: bytes, *, deadline: float, verify: bool = True) -> Lease:
        """Open `ticket`, once, and return a lease of its bytes, whose length and checksum are verified (a checksum over
        tensors is left to who knows them).

        `verify=False` leaves the checksum to a reader that copies the bytes anyway, and calls `Lease.confirm` then.

        Raises `CodecError` for bytes that are no ticket, `TransportBroken` for a ticket that was opened before,
        revoked, or belongs to a sender or reader not accepted here, and when the bytes differ from what was exported
        (naming sequence and both checksums).
        """

    @abstractmethod
    def close(self) -> None:
        """Release the leases still held, and detach. The caller reads none of them any more. Closing twice does
        nothing."""

    @abstractmethod
    def abort(self) -> None:
        """Detach at once, from any thread; `receive` waiting elsewhere raises `TransportClosed`.

        Leases still held are *not* released, since their readers may be busy: each is released by its holder.
        """
