"""Checks that every transport must pass, which know only the interface. Run them by `weightsync.testing`.

A check takes `make_pair` and makes the pairs it needs. If mapped and broadcast transports differ by nature, it asks
`BucketSender.mapped`. The receivers of a pair may be proxies of other processes, so checks touch memory only through
`fill` and `read`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from weightsync.errors import CodecError, LocalProtocolError, TransportBroken, TransportClosed, TransportTimeout
from weightsync.transports.conformance_kit import (
    PROMPT,
    SHORT,
    Call,
    attached,
    deliver,
    hostile,
    leased,
    made_bytes,
    pause,
    raises,
    send,
    soon,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightsync.transports.base import BucketReceiver, BucketSender
    from weightsync.transports.conformance_kit import MakePair

__all__ = ["CHECKS", "warm_up"]


def bytes_arrive(make_pair: MakePair) -> None:
    """The received bytes equal the exported ones, for no byte, one, an odd number and a full slot."""
    slot_bytes = 100_003
    with attached(make_pair, 2, 2, slot_bytes) as pair:
        for sequence, nbytes in enumerate((0, 1, 4097, slot_bytes - 1, slot_bytes), start=1):
            data = made_bytes(sequence, nbytes)
            leases = send(pair, 0, sequence, data)
            for lease in leases:
                assert pair.read(lease) == data, f"{nbytes} bytes differ"
                assert (lease.nbytes, lease.sequence) == (nbytes, sequence)
                lease.release()
            pair.sender.wait_released(0, deadline=soon())


def slots_in_flight(make_pair: MakePair) -> None:
    """Several slots are exported, and leased, at the same time, and again and again."""
    slots, slot_bytes = 3, 20_000
    with attached(make_pair, 2, slots, slot_bytes) as pair:
        for turn in range(4):
            data = [made_bytes(turn * slots + slot, slot_bytes - slot) for slot in range(slots)]
            tickets = []
            for slot in range(slots):
                pair.sender.wait_released(slot, deadline=soon())
                pair.fill(slot, data[slot])
                tickets.append(pair.sender.export(slot, len(data[slot]), turn * slots + slot, pair.readers))
            leases = [leased(deliver(pair, slot, tickets[slot])) for slot in range(slots)]
            for slot in range(slots):
                assert all(pair.read(lease) == data[slot] for lease in leases[slot]), f"slot {slot} differs"
            for lease in (lease for group in leases for lease in group):
                lease.release()


def a_ticket_for_each(make_pair: MakePair) -> None:
    """Each reader has a ticket of its own, which another reader cannot open."""
    with attached(make_pair, 2, 1, 1000) as pair:
        pair.fill(0, made_bytes(1, 1000))
        tickets = pair.sender.export(0, 1000, 1, pair.readers)
        assert set(tickets) == set(pair.readers)
        assert len(set(tickets.values())) == 2, "two readers got the same ticket"
        with raises(TransportBroken):
            pair.receivers[0].receive(tickets[pair.readers[1]], deadline=soon())
        for lease in leased(deliver(pair, 0, tickets)):
            lease.release()


def a_ticket_opens_once(make_pair: MakePair) -> None:
    """A ticket that was opened is refused, while its lease is held and afterwards."""
    with attached(make_pair, 1, 1, 1000) as pair:
        pair.fill(0, made_bytes(1, 1000))
        tickets = pair.sender.export(0, 1000, 1, pair.readers)
        (lease,) = leased(deliver(pair, 0, tickets))
        for _ in range(2):
            with raises(TransportBroken):
                pair.receivers[0].receive(tickets[pair.readers[0]], deadline=soon())
            lease.release()


def altered_bytes(make_pair: MakePair) -> None:
    """A slot that changed after it was exported is an error that names the sequence, and the slot is not held then."""
    with attached(make_pair, 1, 1, 1000) as pair:
        pair.fill(0, made_bytes(1, 1000))
        tickets = pair.sender.export(0, 1000, 987654321, pair.readers)
        pair.fill(0, made_bytes(2, 1000))
        (error,) = deliver(pair, 0, tickets)
        assert isinstance(error, TransportBroken), f"altered bytes were received: {error!r}"
        assert "987654321" in error.message, error.message
        pair.sender.wait_released(0, deadline=soon())


def held_leases(make_pair: MakePair) -> None:
    """While a reader is not done, `pending` names it and `wait_released` times out with its name."""
    with attached(make_pair, 2, 1, 1000) as pair:
        pair.fill(0, made_bytes(1, 1000))
        tickets = pair.sender.export(0, 1000, 1, pair.readers)
        assert pair.sender.pending(0) == tuple(pair.readers)
        with raises(TransportTimeout) as caught:
            pair.sender.wait_released(0, deadline=time.monotonic() + SHORT)
        assert all(reader in str(caught[0]) for reader in pair.readers), caught[0]
        first, second = leased(deliver(pair, 0, tickets))
        if pair.sender.mapped:
            assert pair.sender.pending(0) == tuple(pair.readers)
            first.release()
            assert pair.sender.pending(0) == (pair.readers[1],)
        second.release()
        first.release()
        assert pair.sender.pending(0) == ()


def the_fence_passes(make_pair: MakePair) -> None:
    """A `wait_released` under way returns when the last reader is done."""
    with attached(make_pair, 2, 1, 1000) as pair:
        pair.fill(0, made_bytes(1, 1000))
        tickets = pair.sender.export(0, 1000, 1, pair.readers)
        waiting = Call(lambda: pair.sender.wait_released(0, deadline=soon()))
        for lease in leased(deliver(pair, 0, tickets)):
            lease.release()
        waiting.result()


def stale_release(make_pair: MakePair) -> None:
    """The release of an earlier export does not count for this one."""
    with attached(make_pair, 1, 1, 1000) as pair:
        (old,) = send(pair, 0, 1, made_bytes(1, 1000))
        pair.sender.revoke(0, pair.readers[0])
        pair.fill(0, made_bytes(2, 1000))
        tickets = pair.sender.export(0, 1000, 2, pair.readers)
        old.release()
        assert pair.sender.pending(0) == tuple(pair.readers), "an old release let go of a new export"
        (lease,) = leased(deliver(pair, 0, tickets))
        old.release()
        if pair.sender.mapped:
            assert pair.sender.pending(0) == tuple(pair.readers), "an old release let go of a new export"
        lease.release()
        pair.sender.wait_released(0, deadline=soon())


def revocation(make_pair: MakePair) -> None:
    """A revoked reader is not waited for; the others are. In a mapped transport its ticket is worthless."""
    with attached(make_pair, 2, 1, 1000) as pair:
        pair.fill(0, made_bytes(1, 1000))
        tickets = pair.sender.export(0, 1000, 1, pair.readers)
        pair.sender.revoke(0, pair.readers[0])
        pair.sender.revoke(0, pair.readers[0])
        pair.sender.revoke(0, "nobody/0")
        assert pair.sender.pending(0) == (pair.readers[1],)
        if pair.sender.mapped:
            with raises(TransportBroken):
                pair.receivers[0].receive(tickets[pair.readers[0]], deadline=soon())
            pair.receivers[1].receive(tickets[pair.readers[1]], deadline=soon()).release()
            pair.sender.wait_released(0, deadline=soon())


def readers_added(make_pair: MakePair) -> None:
    """Exporting the same sequence again adds readers to it."""
    with attached(make_pair, 2, 1, 1000) as pair:
        data = made_bytes(1, 1000)
        pair.fill(0, data)
        tickets = pair.sender.export(0, 1000, 1, pair.readers[:1])
        tickets |= pair.sender.export(0, 1000, 1, pair.readers[1:])
        assert pair.sender.pending(0) == tuple(pair.readers)
        for lease in leased(deliver(pair, 0, tickets)):
            with lease:
                assert pair.read(lease) == data
        pair.sender.wait_released(0, deadline=soon())


def leases_end(make_pair: MakePair) -> None:
    """A lease is released by leaving its block, also by an exception, and releasing it again does nothing."""
    with attached(make_pair, 1, 1, 1000) as pair:
        (lease,) = send(pair, 0, 1, made_bytes(1, 1000))
        with raises(ZeroDivisionError), lease:
            _ = 1 / 0
        assert lease.released
        lease.release()
        with raises(LocalProtocolError):
            _ = lease.view
        pair.sender.wait_released(0, deadline=soon())


def misuse(make_pair: MakePair) -> None:
    """A request that breaks the interface's rules is a `LocalProtocolError`, and changes nothing."""
    with attached(make_pair, 2, 2, 1000) as pair:
        sender, readers = pair.sender, pair.readers
        pair.fill(0, made_bytes(1, 1000))
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
            (0, 1000, 5, readers[:1]),  # exported to this reader before
            (0, 999, 5, readers[1:]),  # the same sequence, other bytes
        ):
            with raises(LocalProtocolError):
                sender.export(slot, nbytes, sequence, names)
        assert sender.pending(0) == (readers[0],)
        assert sender.pending(1) == ()
        if sender.mapped:
            pair.receivers[0].receive(tickets[readers[0]], deadline=soon()).release()
            sender.wait_released(0, deadline=soon())


def hostile_offers(make_pair: MakePair) -> None:
    """Truncated, altered and random bytes are refused as offers with `CodecError`, and do no harm."""
    with make_pair(1, 1, 1000) as pair:
        offer = pair.sender.offer(pair.readers[0])
        for bad in hostile(offer, seed=1):
            with raises(CodecError):
                pair.receivers[0].accept(bad, deadline=soon())
        pair.receivers[0].accept(offer, deadline=soon())
        pair.receivers[0].accept(offer, deadline=soon())
        for lease in send(pair, 0, 1, made_bytes(1, 1000)):
            lease.release()


def hostile_tickets(make_pair: MakePair) -> None:
    """Truncated, altered and random bytes are refused as tickets with `CodecError`, and the ticket still opens."""
    with attached(make_pair, 1, 1, 1000) as pair:
        data = made_bytes(1, 1000)
        pair.fill(0, data)
        tickets = pair.sender.export(0, 1000, 1, pair.readers)
        for bad in (*hostile(tickets[pair.readers[0]], seed=2), pair.sender.offer(pair.readers[0])):
            with raises(CodecError):
                pair.receivers[0].receive(bad, deadline=soon())
        (lease,) = leased(deliver(pair, 0, tickets))
        assert pair.read(lease) == data
        lease.release()


def past_deadlines(make_pair: MakePair) -> None:
    """A deadline that has passed is `TransportTimeout`, and the call can be repeated with another."""
    past = time.monotonic() - 1
    with make_pair(1, 1, 1000) as pair:
        receiver, sender = pair.receivers[0], pair.sender
        offer = sender.offer(pair.readers[0])
        with raises(TransportTimeout):
            receiver.accept(offer, deadline=past)
        receiver.accept(offer, deadline=soon())
        sender.wait_released(0, deadline=past)  # no reader holds the slot: there is nothing to wait for
        pair.fill(0, made_bytes(1, 1000))
        tickets = sender.export(0, 1000, 1, pair.readers)
        with raises(TransportTimeout):
            receiver.receive(tickets[pair.readers[0]], deadline=past)
        with raises(TransportTimeout):
            sender.send(0, deadline=past)
        with raises(TransportTimeout):
            sender.wait_released(0, deadline=past)
        for lease in leased(deliver(pair, 0, tickets)):
            lease.release()


def abort_unblocks_sender(make_pair: MakePair) -> None:
    """`abort` of the sender promptly ends its calls that wait, with `TransportClosed`."""
    with attached(make_pair, 1, 1, 1000) as pair:
        pair.fill(0, made_bytes(1, 1000))
        pair.sender.export(0, 1000, 1, pair.readers)
        calls = [Call(lambda: pair.sender.wait_released(0, deadline=soon()))]
        if not pair.sender.mapped:
            calls.append(Call(lambda: pair.sender.send(0, deadline=soon())))
        pause(SHORT)
        assert not any(call.done for call in calls), "nothing to abort: it did not wait"
        start = time.monotonic()
        pair.sender.abort()
        for call in calls:
            with raises(TransportClosed):
                call.result()
        assert time.monotonic() - start < PROMPT


def abort_unblocks_receiver(make_pair: MakePair) -> None:
    """`abort` of a receiver promptly ends a `receive` that waits, with `TransportClosed`."""
    with attached(make_pair, 1, 1, 1000) as pair:
        pair.fill(0, made_bytes(1, 1000))
        tickets = pair.sender.export(0, 1000, 1, pair.readers)
        receiver, ticket = pair.receivers[0], tickets[pair.readers[0]]
        call = None
        if not pair.sender.mapped:
            call = Call(lambda: receiver.receive(ticket, deadline=soon()))
            pause(SHORT)
            assert not call.done, "nothing to abort: it did not wait"
        start = time.monotonic()
        receiver.abort()
        with raises(TransportClosed):
            _ = receiver.receive(ticket, deadline=soon()) if call is None else call.result()
        assert time.monotonic() - start < PROMPT


def leases_outlive_abort(make_pair: MakePair) -> None:
    """A lease stays readable after its receiver was aborted, and is released by its holder."""
    with attached(make_pair, 1, 1, 1000) as pair:
        data = made_bytes(1, 1000)
        (lease,) = send(pair, 0, 1, data)
        pair.receivers[0].abort()
        assert pair.read(lease) == data
        if pair.sender.mapped:
            assert pair.sender.pending(0) == tuple(pair.readers)
        lease.release()
        if pair.sender.mapped:
            pair.sender.wait_released(0, deadline=soon())


def close_releases(make_pair: MakePair) -> None:
    """`close` of a receiver releases the leases it still holds."""
    with attached(make_pair, 1, 1, 1000) as pair:
        (lease,) = send(pair, 0, 1, made_bytes(1, 1000))
        pair.receivers[0].close()
        assert lease.released
        pair.sender.wait_released(0, deadline=soon())


def closed_is_closed(make_pair: MakePair) -> None:
    """After `close` or `abort`, in any order and number, everything else raises `TransportClosed`."""
    for ways in (("close",), ("abort",), ("close", "close", "abort"), ("abort", "abort", "close")):
        with attached(make_pair, 1, 1, 1000) as pair:
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
        lambda: sender.send(0, deadline=soon()),
        lambda: sender.pending(0),
        lambda: sender.wait_released(0, deadline=soon()),
        lambda: sender.revoke(0, reader),
        lambda: receiver.accept(offer, deadline=soon()),
        lambda: receiver.receive(ticket, deadline=soon()),
    )
    for call in calls:
        with raises(TransportClosed):
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
    """Move one bucket, so that modules and threads that come up once are there before leaks are looked for."""
    with attached(make_pair, 1, 1, 1000) as pair:
        for lease in send(pair, 0, 1, made_bytes(1, 1000)):
            lease.release()
