"""Helpers of the transports' conformance checks: the pair under test, and functions that use it.

`deliver` moves a bucket. It runs `send` and every `receive` at the same time, which suits mapped and broadcast
transports alike.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

from weightsync.transports.base import Lease

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from weightsync.transports.base import BucketReceiver, BucketSender

__all__ = [
    "PROMPT",
    "SECONDS",
    "SHORT",
    "Call",
    "MakePair",
    "TransportPair",
    "attached",
    "deliver",
    "hostile",
    "leased",
    "made_bytes",
    "pause",
    "raises",
    "send",
    "soon",
]

SECONDS = 30.0  # for anything that should succeed
SHORT = 0.2  # for a wait that should time out
PROMPT = 5.0  # for an abort to take effect


class TransportPair(Protocol):
    """A sender with a receiver for each reader, in one process as far as the checks can tell."""

    @property
    def sender(self) -> BucketSender:
        """The sender under test."""

    @property
    def receivers(self) -> Sequence[BucketReceiver]:
        """One receiver for each reader."""

    @property
    def readers(self) -> Sequence[str]:
        """The readers' names, in the order of `receivers`."""

    def fill(self, slot: int, data: bytes) -> None:
        """Write `data` to the beginning of a slot of the sender."""

    def read(self, lease: Lease) -> bytes:
        """Return the bytes of a lease."""


MakePair = Callable[[int, int, int], AbstractContextManager[TransportPair]]  # readers, slots, slot_bytes


class Call:
    """A call in a thread of its own."""

    def __init__(self, job: Callable[[], object]) -> None:
        self._value: object = None
        self._error: BaseException | None = None
        self._job = job
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def outcome(self) -> object:
        """Return the call's result or its exception."""
        self._thread.join(2 * SECONDS)
        assert self.done, "the call hangs, past its deadline"
        return self._value if self._error is None else self._error

    def result(self) -> object:
        """Return the call's result, or raise its exception."""
        outcome = self.outcome()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _run(self) -> None:
        try:
            self._value = self._job()
        except BaseException as error:  # noqa: BLE001 - `outcome` and `result` hand it on
            self._error = error


def deliver(pair: TransportPair, slot: int, tickets: Mapping[str, bytes]) -> list[object]:
    """Send `slot` and open each ticket at its reader, all at once. Returns a lease or an exception for each."""

    def receiving(receiver: BucketReceiver, ticket: bytes) -> Callable[[], object]:
        return lambda: receiver.receive(ticket, deadline=soon())

    calls = [
        Call(receiving(receiver, tickets[reader]))
        for receiver, reader in zip(pair.receivers, pair.readers, strict=True)
        if reader in tickets
    ]
    pair.sender.send(slot, deadline=soon())
    return [call.outcome() for call in calls]


def leased(outcomes: Sequence[object]) -> list[Lease]:
    leases = []
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        assert isinstance(outcome, Lease)
        leases.append(outcome)
    return leases


def send(pair: TransportPair, slot: int, sequence: int, data: bytes) -> list[Lease]:
    """Fill, export to all readers, deliver."""
    pair.fill(slot, data)
    return leased(deliver(pair, slot, pair.sender.export(slot, len(data), sequence, pair.readers)))


@contextmanager
def attached(make_pair: MakePair, readers: int, slots: int, slot_bytes: int) -> Iterator[TransportPair]:
    """Yield a pair whose receivers have accepted their offers."""
    with make_pair(readers, slots, slot_bytes) as pair:
        for receiver, reader in zip(pair.receivers, pair.readers, strict=True):
            receiver.accept(pair.sender.offer(reader), deadline=soon())
        yield pair


@contextmanager
def raises(kind: type[BaseException]) -> Iterator[list[BaseException]]:
    caught: list[BaseException] = []
    try:
        yield caught
    except kind as error:
        caught.append(error)
    else:
        raise AssertionError(f"{kind.__name__} was not raised")


def hostile(good: bytes, *, seed: int) -> Iterator[bytes]:
    """Yield every truncation of `good`, 500 mutations and 500 random strings, the same for the same seed."""
    chance = random.Random(seed)
    yield from (good[:length] for length in range(len(good)))
    yield good + b"\0"
    for _ in range(500):
        bad = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            bad[chance.randrange(len(bad))] ^= chance.randint(1, 255)
        if bad != good:
            yield bytes(bad)
    for _ in range(500):
        yield chance.randbytes(chance.randrange(2 * len(good)))


def made_bytes(seed: int, nbytes: int) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def pause(seconds: float) -> None:
    threading.Event().wait(seconds)


def soon() -> float:
    return time.monotonic() + SECONDS
