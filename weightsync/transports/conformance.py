"""What every transport must do, as checks that know only the interface. Run them by `weightsync.testing`.

A check takes `make_pair` and makes the pairs it needs. It moves a bucket by `_deliver`, which runs `send` and each
`receive` at the same time, so that it holds for handoffs and collectives alike; where the two differ by their nature it
asks `Capabilities`. The receivers of a pair may be proxies of other processes: nothing here looks at memory except
through `fill` and `read`.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

from weightsync.errors import (
    CodecError,
    LocalProtocolError,
    TransportBroken,
    TransportClosed,
    TransportTimeout,
)
from weightsync.transports.base import Lease

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from weightsync.transports.base import BucketReceiver, BucketSender

__all__ = ["CHECKS", "MakePair", "TransportPair", "warm_up"]

SECONDS = 30.0  # for anything that should succeed
SHORT = 0.2  # for a wait that should time out
PROMPT = 5.0  # within which an abort must be felt


class TransportPair(Protocol):
    """A sender with a receiver for each reader, in one process as far as the checks can tell."""

    @property
    def sender(self) -> BucketSender:
        """The one that is checked."""

    @property
    def receivers(self) -> Sequence[BucketReceiver]:
        """One for each reader."""

    @property
    def readers(self) -> Sequence[str]:
        """Their names, in the same order."""

    def fill(self, slot: int, data: bytes) -> None:
        """Write `data` to the beginning of a slot of the sender."""

    def read(self, lease: Lease) -> bytes:
        """The bytes of a lease."""


MakePair = Callable[[int, int, int], AbstractContextManager[TransportPair]]  # readers, slots, slot_bytes


def bytes_arrive(make_pair: MakePair) -> None:
    """What is received equals what was exported, for no byte, one, an odd number and a full slot."""
    slot_bytes = 100_003
    with _attached(make_pair, 2, 2, slot_bytes) as pair:
        for sequence, nbytes in enumerate((0, 1, 4097, slot_bytes - 1, slot_bytes), start=1):
            data = _bytes(sequence, nbytes)
            leases = _send(pair, 0, sequence, data)
            for lease in leases:
                assert pair.read(lease) == data, f"{nbytes} bytes differ"
                assert (lease.nbytes, lease.sequence) == (nbytes, sequence)
                lease.release()
            pair.sender.wait_released(0, deadline=_soon())


def slots_in_flight(make_pair: MakePair) -> None:
    """Several slots are exported, and leased, at the same time, and again and again."""
    slots, slot_bytes = 3, 20_000
    with _attached(make_pair, 2, slots, slot_bytes) as pair:
        for turn in range(4):
            data = [_bytes(turn * slots + slot, slot_bytes - slot) for slot in range(slots)]
            tickets = []
            for slot in range(slots):
                pair.sender.wait_released(slot, deadline=_soon())
                pair.fill(slot, data[slot])
                tickets.append(pair.sender.export(slot, len(data[slot]), turn * slots + slot, pair.readers))
            leases = [_leases(_deliver(pair, slot, tickets[slot])) for slot in range(slots)]
            for slot in range(slots):
                assert all(pair.read(lease) == data[slot] for lease in leases[slot]), f"slot {slot} differs"
            for lease in (lease for group in leases for lease in group):
                lease.release()


def a_ticket_for_each(make_pair: MakePair) -> None:
    """Each reader has a ticket of its own, which another reader cannot open."""
    with _attached(make_pair, 2, 1, 1000) as pair:
        pair.fill(0, _bytes(1, 1000))
        tickets = pair.sender.export(0, 1000, 1, pair.readers)
        assert set(tickets) == set(pair.readers)
        assert len(set(tickets.values())) == 2, "two readers got the same ticket"
        with _raises(TransportBroken):
            pair.receivers[0].receive(tickets[pair.readers[1]], deadline=_soon())
        for lease in _leases(_deliver(pair, 0, tickets)):
            lease.release()


def a_ticket_opens_once(make_pair: MakePair) -> None:
    """A ticket that was opened is refused, while its lease is held and afterwards."""
    with _attached(make_pair, 1, 1, 1000) as pair:
        pair.fill(0, _bytes(1, 1000))
        tickets = pair.sender.export(0, 1000, 1, pair.readers)
        (lease,) = _leases(_deliver(pair, 0, tickets))
        for _ in range(2):
            with _raises(TransportBroken):
                pair.receivers[0].receive(tickets[pair.readers[0]], deadline=_soon())
            lease.release()


def altered_bytes(make_pair: MakePair) -> None:
    """A slot that changed after it was exported is an error that names the sequence, and nobody holds it then."""
    with _attached(make_pair, 1, 1, 1000) as pair:
        pair.fill(0, _bytes(1, 1000))
        tickets = pair.sender.export(0, 1000, 987654321, pair.readers)
        pair.fill(0, _bytes(2, 1000))
        (error,) = _deliver(pair, 0, tickets)
        assert isinstance(error, TransportBroken), f"altered bytes were received: {error!r}"
        assert "987654321" in error.message, error.message
        pair.sender.wait_released(0, deadline=_soon())


def held_leases(make_pair: MakePair) -> None:
    """While a reader is not done, `pending` names it and `wait_released` times out with its name."""
    with _attached(make_pair, 2, 1, 1000) as pair:
        pair.fill(0, _bytes(1, 1000))
        tickets = pair.sender.export(0, 1000, 1, pair.readers)
        assert pair.sender.pending(0) == tuple(pair.readers)
        with _raises(TransportTimeout) as caught:
            pair.sender.wait_released(0, deadline=time.monotonic() + SHORT)
        assert all(reader in str(caught[0]) for reader in pair.readers), caught[0]
        first, second = _leases(_deliver(pair, 0, tickets))
        if not pair.sender.capabilities.collective:
            assert pair.sender.pending(0) == tuple(pair.readers)
            first.release()
            assert pair.sender.pending(0) == (pair.readers[1],)
        second.release()
        first.release()
        assert pair.sender.pending(0) == ()


def the_fence_passes(make_pair: MakePair) -> None:
    """A `wait_released` under way returns when the last reader is done."""
    with _attached(make_pair, 2, 1, 1000) as pair:
        pair.fill(0, _bytes(1, 1000))
        tickets = pair.sender.export(0, 1000, 1, pair.readers)
        waiting = _Call(lambda: pair.sender.wait_released(0, deadline=_soon()))
        for lease in _leases(_deliver(pair, 0, tickets)):
            lease.release()
        waiting.result()


def stale_release(make_pair: MakePair) -> None:
    """The release of an earlier export does not count for this one."""
    with _attached(make_pair, 1, 1, 1000) as pair:
        (old,) = _send(pair, 0, 1, _bytes(1, 1000))
        pair.sender.revoke(0, pair.readers[0])
        pair.fill(0, _bytes(2, 1000))
        tickets = pair.sender.export(0, 1000, 2, pair.readers)
        old.release()
        assert pair.sender.pending(0) == tuple(pair.readers), "an old release let go of a new export"
        (lease,) = _leases(_deliver(pair, 0, tickets))
        old.release()
        if not pair.sender.capabilities.collective:
            assert pair.sender.pending(0) == tuple(pair.readers), "an old release let go of a new export"
        lease.release()
        pair.sender.wait_released(0, deadline=_soon())


def revocation(make_pair: MakePair) -> None:
    """A revoked reader is not waited for; the others are. In a handoff its ticket is worthless."""
    with _attached(make_pair, 2, 1, 1000) as pair:
        pair.fill(0, _bytes(1, 1000))
        tickets = pair.sender.export(0, 1000, 1, pair.readers)
        pair.sender.revoke(0, pair.readers[0])
        pair.sender.revoke(0, pair.readers[0])
        pair.sender.revoke(0, "nobody/0")
        assert pair.sender.pending(0) == (pair.readers[1],)
        if not pair.sender.capabilities.collective:
            with _raises(TransportBroken):
                pair.receivers[0].receive(tickets[pair.readers[0]], deadline=_soon())
            pair.receivers[1].receive(tickets[pair.readers[1]], deadline=_soon()).release()
            pair.sender.wait_released(0, deadline=_soon())


def readers_added(make_pair: MakePair) -> None:
    """Exporting the same sequence again adds readers to it."""
    with _attached(make_pair, 2, 1, 1000) as pair:
        data = _bytes(1, 1000)
        pair.fill(0, data)
        tickets = pair.sender.export(0, 1000, 1, pair.readers[:1])
        tickets |= pair.sender.export(0, 1000, 1, pair.readers[1:])
        assert pair.sender.pending(0) == tuple(pair.readers)
        for lease in _leases(_deliver(pair, 0, tickets)):
            with lease:
                assert pair.read(lease) == data
        pair.sender.wait_released(0, deadline=_soon())


def leases_end(make_pair: MakePair) -> None:
    """A lease is released by leaving its block, also by an exception, and releasing it again does nothing."""
    with _attached(make_pair, 1, 1, 1000) as pair:
        (lease,) = _send(pair, 0, 1, _bytes(1, 1000))
        with _raises(ZeroDivisionError), lease:
            _ = 1 / 0
        assert lease.released
        lease.release()
        with _raises(LocalProtocolError):
            _ = lease.view
        pair.sender.wait_released(0, deadline=_soon())


def misuse(make_pair: MakePair) -> None:
    """What the caller must not ask for is a `LocalProtocolError`, and changes nothing."""
    with _attached(make_pair, 2, 2, 1000) as pair:
        sender, readers = pair.sender, pair.readers
        pair.fill(0, _bytes(1, 1000))
        tickets = sender.export(0, 1000, 5, readers[:1])
        for slot, nbytes, sequence, names in (
            (2, 1000, 6, readers),  # no such slot
            (-1, 1000, 6, readers),
            (1, 1001, 6, readers),  # larger than a slot
            (1, -1, 6, readers),
            (1, 1000, -1, readers),
            (1, 1000, 2**60, readers),
            (1, 1000, 6, ["stranger/0"]),  # nothing was offered
            (1, 1000, 6, [readers[0], readers[0]]),
            (0, 1000, 6, readers),  # held
            (0, 1000, 4, readers),  # in the past
            (0, 1000, 5, readers[:1]),  # given to it before
            (0, 999, 5, readers[1:]),  # the same sequence, other bytes
        ):
            with _raises(LocalProtocolError):
                sender.export(slot, nbytes, sequence, names)
        assert sender.pending(0) == (readers[0],)
        assert sender.pending(1) == ()
        if not sender.capabilities.collective:
            pair.receivers[0].receive(tickets[readers[0]], deadline=_soon()).release()
            sender.wait_released(0, deadline=_soon())


def hostile_offers(make_pair: MakePair) -> None:
    """Truncated, altered and random bytes are refused as offers with `CodecError`, and do no harm."""
    with make_pair(1, 1, 1000) as pair:
        offer = pair.sender.offer(pair.readers[0])
        for hostile in _hostile(offer, seed=1):
            with _raises(CodecError):
                pair.receivers[0].accept(hostile, deadline=_soon())
        pair.receivers[0].accept(offer, deadline=_soon())
        pair.receivers[0].accept(offer, deadline=_soon())
        for lease in _send(pair, 0, 1, _bytes(1, 1000)):
            lease.release()


def hostile_tickets(make_pair: MakePair) -> None:
    """Truncated, altered and random bytes are refused as tickets with `CodecError`, and the ticket still opens."""
    with _attached(make_pair, 1, 1, 1000) as pair:
        data = _bytes(1, 1000)
        pair.fill(0, data)
        tickets = pair.sender.export(0, 1000, 1, pair.readers)
        for hostile in (*_hostile(tickets[pair.readers[0]], seed=2), pair.sender.offer(pair.readers[0])):
            with _raises(CodecError):
                pair.receivers[0].receive(hostile, deadline=_soon())
        (lease,) = _leases(_deliver(pair, 0, tickets))
        assert pair.read(lease) == data
        lease.release()


def past_deadlines(make_pair: MakePair) -> None:
    """A deadline that has passed is `TransportTimeout`, and the call can be repeated with another."""
    past = time.monotonic() - 1
    with make_pair(1, 1, 1000) as pair:
        receiver, sender = pair.receivers[0], pair.sender
        offer = sender.offer(pair.readers[0])
        with _raises(TransportTimeout):
            receiver.accept(offer, deadline=past)
        receiver.accept(offer, deadline=_soon())
        sender.wait_released(0, deadline=past)  # nobody holds it: there is nothing to wait for
        pair.fill(0, _bytes(1, 1000))
        tickets = sender.export(0, 1000, 1, pair.readers)
        with _raises(TransportTimeout):
            receiver.receive(tickets[pair.readers[0]], deadline=past)
        with _raises(TransportTimeout):
            sender.send(0, deadline=past)
        with _raises(TransportTimeout):
            sender.wait_released(0, deadline=past)
        for lease in _leases(_deliver(pair, 0, tickets)):
            lease.release()


def abort_unblocks_sender(make_pair: MakePair) -> None:
    """`abort` of the sender ends what waits in it, promptly, with `TransportClosed`."""
    with _attached(make_pair, 1, 1, 1000) as pair:
        pair.fill(0, _bytes(1, 1000))
        pair.sender.export(0, 1000, 1, pair.readers)
        calls = [_Call(lambda: pair.sender.wait_released(0, deadline=_soon()))]
        if pair.sender.capabilities.collective:
            calls.append(_Call(lambda: pair.sender.send(0, deadline=_soon())))
        _pause(SHORT)
        assert not any(call.done for call in calls), "nothing to abort: it did not wait"
        start = time.monotonic()
        pair.sender.abort()
        for call in calls:
            with _raises(TransportClosed):
                call.result()
        assert time.monotonic() - start < PROMPT


def abort_unblocks_receiver(make_pair: MakePair) -> None:
    """`abort` of a receiver ends a `receive` that waits, promptly, with `TransportClosed`."""
    with _attached(make_pair, 1, 1, 1000) as pair:
        pair.fill(0, _bytes(1, 1000))
        tickets = pair.sender.export(0, 1000, 1, pair.readers)
        receiver, ticket = pair.receivers[0], tickets[pair.readers[0]]
        call = None
        if pair.sender.capabilities.collective:
            call = _Call(lambda: receiver.receive(ticket, deadline=_soon()))
            _pause(SHORT)
            assert not call.done, "nothing to abort: it did not wait"
        start = time.monotonic()
        receiver.abort()
        with _raises(TransportClosed):
            _ = receiver.receive(ticket, deadline=_soon()) if call is None else call.result()
        assert time.monotonic() - start < PROMPT


def leases_outlive_abort(make_pair: MakePair) -> None:
    """A lease stays readable after its receiver was aborted, and is released by its holder."""
    with _attached(make_pair, 1, 1, 1000) as pair:
        data = _bytes(1, 1000)
        (lease,) = _send(pair, 0, 1, data)
        pair.receivers[0].abort()
        assert pair.read(lease) == data
        if not pair.sender.capabilities.collective:
            assert pair.sender.pending(0) == tuple(pair.readers)
        lease.release()
        if not pair.sender.capabilities.collective:
            pair.sender.wait_released(0, deadline=_soon())


def close_releases(make_pair: MakePair) -> None:
    """`close` of a receiver releases the leases it still holds."""
    with _attached(make_pair, 1, 1, 1000) as pair:
        (lease,) = _send(pair, 0, 1, _bytes(1, 1000))
        pair.receivers[0].close()
        assert lease.released
        pair.sender.wait_released(0, deadline=_soon())


def closed_is_closed(make_pair: MakePair) -> None:
    """After `close` or `abort`, in any order and number, everything else raises `TransportClosed`."""
    for ways in (("close",), ("abort",), ("close", "close", "abort"), ("abort", "abort", "close")):
        with _attached(make_pair, 1, 1, 1000) as pair:
            offer = pair.sender.offer(pair.readers[0])
            ticket = pair.sender.export(0, 10, 1, pair.readers)[pair.readers[0]]
            for way in ways:
                getattr(pair.receivers[0], way)()
                getattr(pair.sender, way)()
            _refuses_everything(pair.sender, pair.receivers[0], pair.readers[0], offer, ticket)


def _refuses_everything(
    sender: BucketSender, receiver: BucketReceiver, reader: str, offer: bytes, ticket: bytes
) -> None:
    assert sender.closed
    assert receiver.closed
    calls: tuple[Callable[[], object], ...] = (
        lambda: sender.offer(reader),
        lambda: sender.export(0, 10, 2, [reader]),
        lambda: sender.send(0, deadline=_soon()),
        lambda: sender.pending(0),
        lambda: sender.wait_released(0, deadline=_soon()),
        lambda: sender.revoke(0, reader),
        lambda: receiver.accept(offer, deadline=_soon()),
        lambda: receiver.receive(ticket, deadline=_soon()),
    )
    for call in calls:
        with _raises(TransportClosed):
            call()


CHECKS: dict[str, Callable[[MakePair], None]] = {
    check.__name__: check
    for check in (
        bytes_arrive,
        slots_in_flight,
        a_ticket_for_each,
        a_ticket_opens_once,
        altered_bytes,
        held_leases,
        the_fence_passes,
        stale_release,
        revocation,
        readers_added,
        leases_end,
        misuse,
        hostile_offers,
        hostile_tickets,
        past_deadlines,
        abort_unblocks_sender,
        abort_unblocks_receiver,
        leases_outlive_abort,
        close_releases,
        closed_is_closed,
    )
}


def warm_up(make_pair: MakePair) -> None:
    """Move one bucket, so that what is loaded and started only once is there before leaks are looked for."""
    with _attached(make_pair, 1, 1, 1000) as pair:
        for lease in _send(pair, 0, 1, _bytes(1, 1000)):
            lease.release()


class _Call:
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
        """What the call returned or raised."""
        self._thread.join(2 * SECONDS)
        assert self.done, "the call hangs, past its deadline"
        return self._value if self._error is None else self._error

    def result(self) -> object:
        """What the call returned; raises what it raised."""
        outcome = self.outcome()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _run(self) -> None:
        try:
            self._value = self._job()
        except BaseException as error:  # noqa: BLE001 - handed to whoever asks
            self._error = error


def _deliver(pair: TransportPair, slot: int, tickets: Mapping[str, bytes]) -> list[object]:
    """Send `slot` and open each ticket at its reader, all at once: a lease, or what was raised, for each reader."""

    def receiving(receiver: BucketReceiver, ticket: bytes) -> Callable[[], object]:
        return lambda: receiver.receive(ticket, deadline=_soon())

    calls = [
        _Call(receiving(receiver, tickets[reader]))
        for receiver, reader in zip(pair.receivers, pair.readers, strict=True)
        if reader in tickets
    ]
    pair.sender.send(slot, deadline=_soon())
    return [call.outcome() for call in calls]


def _leases(outcomes: Sequence[object]) -> list[Lease]:
    leases = []
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        assert isinstance(outcome, Lease)
        leases.append(outcome)
    return leases


def _send(pair: TransportPair, slot: int, sequence: int, data: bytes) -> list[Lease]:
    """Fill, export to all readers, deliver."""
    pair.fill(slot, data)
    return _leases(_deliver(pair, slot, pair.sender.export(slot, len(data), sequence, pair.readers)))


@contextmanager
def _attached(make_pair: MakePair, readers: int, slots: int, slot_bytes: int) -> Iterator[TransportPair]:
    """A pair whose receivers have accepted their offers."""
    with make_pair(readers, slots, slot_bytes) as pair:
        for receiver, reader in zip(pair.receivers, pair.readers, strict=True):
            receiver.accept(pair.sender.offer(reader), deadline=_soon())
        yield pair


@contextmanager
def _raises(kind: type[BaseException]) -> Iterator[list[BaseException]]:
    caught: list[BaseException] = []
    try:
        yield caught
    except kind as error:
        caught.append(error)
    else:
        raise AssertionError(f"{kind.__name__} was not raised")


def _hostile(good: bytes, *, seed: int) -> Iterator[bytes]:
    """Every truncation, 500 mutations and 500 random strings, the same ones for one seed."""
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


def _bytes(seed: int, nbytes: int) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def _pause(seconds: float) -> None:
    threading.Event().wait(seconds)


def _soon() -> float:
    return time.monotonic() + SECONDS
