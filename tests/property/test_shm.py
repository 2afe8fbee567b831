"""ShmSender and ShmReceiver against a model: in any order, a slot is free exactly when all its readers are done."""

from __future__ import annotations

import tempfile
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from weightsync.errors import LocalProtocolError, TransportBroken
from weightsync.ipc.arena import Arena
from weightsync.ipc.ledger import Ledger
from weightsync.transports.shm import ShmReceiver, ShmSender

if TYPE_CHECKING:
    from weightsync.transports.base import Lease

SLOTS, READERS = 2, ("a/0", "a/1", "b/0")
slots = st.integers(0, SLOTS - 1)
some_readers = st.lists(st.sampled_from(READERS), unique=True, min_size=1)


class ShmMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        self.directory = tempfile.TemporaryDirectory()
        self.arena = Arena.create(node="n", bridge=0, slots=SLOTS, slot_bytes=64, directory=self.directory.name)
        self.ledger = Ledger()
        self.sender = ShmSender(self.arena, ledger=self.ledger)
        self.receivers = {reader: ShmReceiver() for reader in READERS}
        for reader, receiver in self.receivers.items():
            receiver.accept(self.sender.offer(reader), deadline=_soon())
        self.sequence = 0
        self.current: dict[int, tuple[int, bytes, set[str]]] = {}  # slot → sequence, bytes, all its readers
        self.pending: dict[int, list[str]] = {slot: [] for slot in range(SLOTS)}  # what must be pending
        self.tickets: list[tuple[int, int, str, bytes]] = []  # slot, sequence, reader, ticket: not opened yet
        self.spent: list[tuple[str, bytes]] = []  # opened, revoked or overtaken
        self.leases: list[tuple[int, int, str, Lease]] = []

    @rule(slot=slots, readers=some_readers)
    def export(self, slot, readers):
        self.sequence += 1
        data = bytes([self.sequence % 256]) * 64
        if self.pending[slot]:
            with pytest.raises(LocalProtocolError):
                self.sender.export(slot, 64, self.sequence, readers)
            return
        self.arena.slot(slot)[:] = data
        tickets = self.sender.export(slot, 64, self.sequence, readers)
        self.spent += [(reader, ticket) for old, _, reader, ticket in self.tickets if old == slot]
        self.tickets = [entry for entry in self.tickets if entry[0] != slot]
        self.tickets += [(slot, self.sequence, reader, ticket) for reader, ticket in tickets.items()]
        self.current[slot] = (self.sequence, data, set(readers))
        self.pending[slot] = list(readers)

    @precondition(lambda self: self.current)
    @rule(slot=slots, reader=st.sampled_from(READERS))
    def add_reader(self, slot, reader):
        if slot not in self.current:
            return
        sequence, _, readers = self.current[slot]
        if reader in readers:
            with pytest.raises(LocalProtocolError):
                self.sender.export(slot, 64, sequence, [reader])
            return
        ticket = self.sender.export(slot, 64, sequence, [reader])[reader]
        readers.add(reader)
        self.tickets.append((slot, sequence, reader, ticket))
        self.pending[slot].append(reader)

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def receive(self, data):
        entry = data.draw(st.sampled_from(self.tickets))
        slot, sequence, reader, ticket = entry
        self.tickets.remove(entry)
        self.spent.append((reader, ticket))
        lease = self.receivers[reader].receive(ticket, deadline=_soon())
        assert (lease.sequence, bytes(lease.view)) == self.current[slot][:2]
        self.leases.append((slot, sequence, reader, lease))

    @precondition(lambda self: self.spent)
    @rule(data=st.data())
    def receive_again(self, data):
        reader, ticket = data.draw(st.sampled_from(self.spent))
        with pytest.raises(TransportBroken):
            self.receivers[reader].receive(ticket, deadline=_soon())

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data):
        entry = data.draw(st.sampled_from(self.leases))
        slot, sequence, reader, lease = entry
        self.leases.remove(entry)
        lease.release()
        if self.current[slot][0] == sequence and reader in self.pending[slot]:
            self.pending[slot].remove(reader)

    @rule(slot=slots, reader=st.sampled_from(READERS))
    def revoke(self, slot, reader):
        self.sender.revoke(slot, reader)
        if reader in self.pending[slot]:
            self.pending[slot].remove(reader)
            self.spent += [(reader, ticket) for s, _, r, ticket in self.tickets if (s, r) == (slot, reader)]
            self.tickets = [entry for entry in self.tickets if (entry[0], entry[2]) != (slot, reader)]

    @invariant()
    def free_exactly_when_all_are_done(self):
        if hasattr(self, "sender"):
            for slot in range(SLOTS):
                assert self.sender.pending(slot) == tuple(self.pending[slot])
            assert self.ledger.outstanding == sum(map(len, self.pending.values()))

    def teardown(self):
        if hasattr(self, "sender"):
            for receiver in self.receivers.values():
                receiver.close()
            self.sender.close()
            self.arena.close()
            self.directory.cleanup()


def _soon() -> float:
    return time.monotonic() + 20


TestShm = ShmMachine.TestCase
TestShm.settings = settings(max_examples=60, stateful_step_count=40)
