"""What each command does to the arena, to the senders for its readers and, once joined, to the communicator.

`lane` says in which thread a command runs: a command that waits for a peer must not hold up the next export, or a
question that is answered from memory. `handle`, `handle_wire` and `handle_group` run it. Nothing here knows of pipes or
of the process's end.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from enum import Enum
from typing import TYPE_CHECKING, Any

from weightsync.errors import LocalProtocolError, TransportBroken, TransportClosed, TransportTimeout
from weightsync.ipc.ledger import Ledger
from weightsync.nccl_bridge import commands as c
from weightsync.nccl_bridge.carrier import Carrier
from weightsync.nccl_bridge.groups import Groups
from weightsync.nccl_bridge.member import Member, new_member
from weightsync.nccl_bridge.rendezvous import Rendezvous, load
from weightsync.nccl_bridge.terms import nccl, prepare
from weightsync.transports.counted import CountedSender
from weightsync.transports.cuda_ipc import CudaIpcSender, DeviceChecksums
from weightsync.transports.exports import Checksum, Checksums
from weightsync.transports.shm import ShmSender
from weightsync.transports.torch_cuda import TorchCudaSender
from weightsync.transports.torch_shm import TorchShmSender

if TYPE_CHECKING:
    from weightsync.ipc.arena import Arena
    from weightsync.ipc.cuda import DeviceSlots
    from weightsync.transports.mapped import MappedSender

__all__ = ["BridgeService", "Lane"]

logger = logging.getLogger(__name__)

_LOOK = 5e-3  # seconds between two looks at whether exports are still held
_LEAVING = 1.0  # seconds that the last operation of an old generation has to end by itself


class Lane(Enum):
    """Where a command runs."""

    NOW = "at once, in the thread that reads the pipe"
    LOCAL = "behind other exports: a checksum, or a copy, takes its time"
    WIRE = "behind other operations of the communicator: these wait for peers"
    FENCE = "in the thread that watches fences"
    GROUP = "in a thread of its own: each waits for an engine, for torch to load or for what is worked out"


_LANES: dict[type[c.AnyCommand], Lane] = {
    c.Export: Lane.LOCAL,
    c.Host: Lane.WIRE,
    c.Join: Lane.WIRE,
    c.Leave: Lane.WIRE,
    c.Send: Lane.WIRE,
    c.Receive: Lane.WIRE,
    c.Exchange: Lane.WIRE,
    c.Deliver: Lane.WIRE,
    c.Collect: Lane.WIRE,
    c.AwaitReleased: Lane.FENCE,
    c.Warm: Lane.GROUP,
    c.Prepare: Lane.GROUP,
    c.OfferGroup: Lane.GROUP,
    c.JoinGroup: Lane.GROUP,
    c.SendGroup: Lane.GROUP,
}


class BridgeService:
    """The bridge called `name`, which owns `arena`; `slots` are None unless they lie on a GPU."""

    def __init__(self, name: str, incarnation: str, arena: Arena, slots: DeviceSlots | None = None) -> None:
        self.name = name
        self.incarnation = incarnation
        self.arena = arena
        self._slots = slots
        self._ledger = Ledger()
        self._checksums = Checksums(arena) if slots is None else DeviceChecksums(arena, slots)
        books: dict[str, Any] = {"ledger": self._ledger, "checksums": self._checksums}
        self._senders: dict[str, MappedSender | CountedSender] = {  # to local readers, by transport
            "mapped": ShmSender(arena, **books) if slots is None else CudaIpcSender(arena, slots, **books),
            "torch-shm": TorchShmSender(arena, **books),
            "torch-cuda": TorchCudaSender(arena, **books),
        }
        self._carrier = Carrier(arena, slots)
        self._one_by_one = threading.Lock()
        self._groups = Groups(name, arena, slots, **books, one_by_one=self._one_by_one)
        self._transports: dict[str, str] = {}  # reader → the transport that it was offered last
        self._hosted: Rendezvous | None = None
        self._member: Member | None = None
        self._departures = 0
        self._lock = threading.Lock()  # over `_member` and `_departures`
        self._sequences: dict[int, int] = {}  # slot → sequence of its last export

    @staticmethod
    def lane(command: c.AnyCommand) -> Lane:
        """Return where `command` runs."""
        return _LANES.get(type(command), Lane.NOW)

    def handle(self, command: c.AnyCommand) -> c.AnyReply:
        """Do a command of the lanes NOW and LOCAL. Raises `WeightSyncError`."""
        match command:
            case c.Hello():
                return self._hello()
            case c.Offer():
                return c.Offered(offer=self._offer(command.reader, command.transport))
            case c.Export():
                return self._export(command)
            case c.Pending():
                return c.PendingReaders(readers=self.pending(command.slot), damaged=self._damaged(command.slot))
            case c.Revoke():
                return self._revoke(command)
            case c.Ledger():
                for sender in self._senders.values():
                    sender.settle()
                return c.LedgerBooks(accounts=self._ledger.accounts())
            case c.LeaveGroup():
                self._groups.leave(command.engine)
                return c.Done()
            case c.Stop():
                return c.Done()
        raise LocalProtocolError(f"{type(command).__name__} does not belong here")

    def handle_wire(self, command: c.AnyCommand, *, deadline: float, departures: int) -> c.AnyReply:
        """Do a command of the lane WIRE; `departures` is the property's value when the command was read from the pipe.

        Raises `WeightSyncError`; `TransportClosed` if a `Leave` has been read since.
        """
        match command:
            case c.Leave():
                self._leave()
                self._hosted = None
                return c.Done()
            case c.Host():
                if self._slots is not None:
                    prepare(command.host)  # now, so that a broken NCCL on this node fails here and not in other members
                self._hosted = Rendezvous.host(command.host, deadline=deadline)
                return c.Hosted(port=self._hosted.port)
            case c.Join():
                self._join(command, deadline, departures)
                return c.Done()
        member = self._joined(departures)
        match command:
            case c.Send():
                if self._sequences.get(command.slot) != command.sequence:
                    raise LocalProtocolError(f"sequence {command.sequence} is not what slot {command.slot} exports")
                member.sender.send(command.slot, deadline=deadline)
                return c.Done()
            case c.Receive():
                return self._receive(member, command, deadline)
            case c.Exchange():
                self._carrier.release()
                self._check_idle(command.slot)
                self._check_generation(member, command.generation)
                member.exchange.run(command.slot, command.token, command.parts, deadline=deadline)
                return c.Done()
            case c.Deliver():
                self._check_generation(member, command.generation)
                self._carry(member, command.token, deadline, packing=True)
                return c.Done()
            case c.Collect():
                self._check_generation(member, command.generation)
                self._carry(member, command.token, deadline, packing=False)
                return c.Done()
        raise LocalProtocolError(f"{type(command).__name__} does not belong here")

    def handle_group(self, command: c.AnyCommand, *, deadline: float) -> c.AnyReply:
        """Do a command of the lane GROUP. Raises `WeightSyncError`."""
        match command:
            case c.Warm():
                load()
                if self._slots is not None:
                    nccl()
                return c.Done()
            case c.Prepare():
                self._carrier.prepare(command, deadline=deadline)
                return c.Done()
            case c.OfferGroup():
                offer = self._groups.offer(command, deadline=deadline)
                self._transports.update(dict.fromkeys(command.readers, "group"))
                return c.Offered(offer=offer)
            case c.JoinGroup():
                self._groups.join(command.engine, deadline=deadline)
                return c.Done()
            case c.SendGroup():
                self._groups.send(command, deadline=deadline)
                return c.Done()
        raise LocalProtocolError(f"{type(command).__name__} does not belong here")

    @property
    def departures(self) -> int:
        """How many `Leave` commands have been read."""
        return self._departures

    def interrupt(self) -> None:
        """End the wire lane's command under way and all that wait before a `Leave`, which was just read."""
        with self._lock:
            self._departures += 1
            member = self._member
        if member is not None:
            member.communicator.abort()

    def released(self, command: c.AwaitReleased, *, deadline: float) -> c.PendingReaders | None:
        """Return the answer, or None while one of the readers may read. Raises `TransportTimeout` after `deadline`."""
        held = [reader for reader in self.pending(command.slot) if reader in command.readers]
        if not held:
            damaged = tuple(reader for reader in self._damaged(command.slot) if reader in command.readers)
            return c.PendingReaders(readers=(), damaged=damaged)
        if time.monotonic() >= deadline:
            raise TransportTimeout(f"slot {command.slot} of bridge {self.name} is still held by {', '.join(held)}")
        return None

    def _damaged(self, slot: int) -> tuple[str, ...]:
        return tuple(reader for sender in self._senders.values() for reader in sender.damaged(slot))

    def pending(self, slot: int) -> tuple[str, ...]:
        """Return readers, then peers, that may still read from `slot`."""
        readers = tuple(reader for sender in self._senders.values() for reader in sender.pending(slot))
        readers += self._groups.pending(slot)
        member = self._member
        if member is None:
            return readers
        try:
            return readers + member.sender.pending(slot)
        except TransportClosed:  # the communicator is being left, so no peer reads any more
            return readers

    def _hello(self) -> c.Ready:
        return c.Ready(
            pid=os.getpid(),
            incarnation=self.incarnation,
            offer=self.arena.offer(),
            slots=self.arena.slots,
            slot_bytes=self.arena.slot_bytes,
        )

    def _offer(self, reader: str, transport: str) -> bytes:
        sender = self._senders.get(transport)
        if sender is None:
            raise LocalProtocolError(
                f"bridge {self.name} has no transport {transport!r} for reader {reader}",
                hint=f"one of: {', '.join(self._senders)}",
            )
        offer = sender.offer(reader)
        self._transports[reader] = transport
        return offer

    def linger(self, seconds: float) -> None:
        """Wait up to `seconds` until stock engines have let go of their exports.

        An engine that was told of an export and does not find it exits (SGLang's scheduler, 0.5.17 and 0.5.23).
        """
        until = time.monotonic() + seconds
        counted = [sender for sender in self._senders.values() if isinstance(sender, CountedSender)]
        while any(sender.held for sender in counted) and time.monotonic() < until:
            threading.Event().wait(_LOOK)

    def close(self) -> None:
        """Remove exports that lie outside the arena. The arena itself is the caller's."""
        for sender in self._senders.values():
            sender.close()

    def _export(self, command: c.Export) -> c.Exported:
        self._carrier.release()  # weights take slots again
        slot, nbytes, sequence = command.slot, command.nbytes, command.sequence
        if self._sequences.get(slot) != sequence:
            self._check_idle(slot)
        member = self._member
        if command.peers and member is None:
            raise LocalProtocolError(f"bridge {self.name} has joined no communicator that reaches {command.peers[0]}")
        if command.checksum is not None:
            self._checksums.know(slot, sequence, nbytes, Checksum("tensors-64", command.checksum))
        tickets = {}
        for transport, sender in self._senders.items():
            readers = [reader for reader in command.readers if self._transports.get(reader, "mapped") == transport]
            if readers or transport == "mapped":  # "mapped" even without readers: its sender checks the arguments
                tickets.update(sender.export(slot, nbytes, sequence, readers))
        for reader in command.readers:
            if self._transports.get(reader) == "group":
                tickets.update(self._groups.export(reader.rpartition("/")[0], slot, nbytes, sequence, reader))
        self._sequences[slot] = sequence
        peer_tickets = {}
        if member is not None and command.peers:
            for peer in command.peers:
                member.sender.offer(peer)
            peer_tickets = member.sender.export(slot, nbytes, sequence, command.peers)
        checksum = self._checksums.of(slot, sequence, nbytes)
        return c.Exported(
            tickets=tickets, peer_tickets=peer_tickets, algorithm=checksum.algorithm, checksum=checksum.value
        )

    def _check_idle(self, slot: int) -> None:
        """Raise `LocalProtocolError` if a reader may still read from `slot`, which is about to get other bytes."""
        if held := self.pending(slot):
            raise LocalProtocolError(f"slot {slot} of bridge {self.name} is still held by {', '.join(held)}")

    def _check_generation(self, member: Member, generation: int) -> None:
        if (joined := member.communicator.generation) != generation:
            raise LocalProtocolError(f"bridge {self.name} has joined generation {joined} since")

    def _carry(self, member: Member, token: int, deadline: float, *, packing: bool) -> None:
        idle = [slot for slot in range(self.arena.slots) if not self.pending(slot)]
        if not idle:
            raise TransportBroken(f"all slots of bridge {self.name} are still held")
        self._carrier.run(member.communicator, token, idle, packing=packing, deadline=deadline)

    def _revoke(self, command: c.Revoke) -> c.Done:
        member = self._member
        for slot in range(self.arena.slots) if command.slot is None else (command.slot,):
            for sender in self._senders.values():
                sender.revoke(slot, command.reader)
            self._groups.revoke(slot, command.reader)
            if member is not None and not member.sender.closed:
                member.sender.revoke(slot, command.reader)
        return c.Done()

    def _joined(self, departures: int) -> Member:
        with self._lock:
            if departures != self._departures:
                raise TransportClosed(f"bridge {self.name} left the communicator before this was begun")
            if self._member is None:
                raise LocalProtocolError(f"bridge {self.name} has joined no communicator")
            return self._member

    def _receive(self, member: Member, command: c.Receive, deadline: float) -> c.Received:
        self._carrier.release()
        self._check_idle(command.slot)
        start = time.perf_counter()
        arrival = member.receiver.receive_into(command.ticket, command.slot, deadline=deadline)
        sequence = arrival.sequence if command.sequence is None else command.sequence
        self._checksums.know(command.slot, sequence, arrival.nbytes, arrival.checksum)
        return c.Received(sequence=sequence, nbytes=arrival.nbytes, seconds=time.perf_counter() - start)

    def _join(self, command: c.Join, deadline: float, departures: int) -> None:
        self._leave()
        hosted = self._hosted
        if hosted is None or hosted.port != command.port or command.rank != 0:
            hosted = Rendezvous.connect(command.host, command.port, deadline=deadline)
        member = new_member(
            command,
            self.name,
            self.arena,
            self._slots,
            ledger=self._ledger,
            checksums=self._checksums,
            one_by_one=self._one_by_one,
            check=lambda: self._joined(departures),
        )
        with self._lock:
            self._member = member  # before joining, so that `interrupt` finds it
        try:
            self._joined(departures)
            member.communicator.join(hosted, command.key, deadline=deadline)
        except BaseException:
            self._leave()
            raise
        logger.info("[generation=%d rank=%d] join.complete world=%d", command.generation, command.rank, command.world)

    def _leave(self) -> None:
        with self._lock:
            member, self._member = self._member, None
        if member is not None:
            member.sender.close()
            member.receiver.close()
            member.communicator.close(deadline=time.monotonic() + _LEAVING)
