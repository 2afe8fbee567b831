"""Process groups of a bridge with engines: offered, joined, used, left. Real engines join them in tests/engines."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any

import numpy as np
import pytest

from weightsync.errors import ConfigError, LocalProtocolError, TransportBroken, TransportClosed, TransportError
from weightsync.ipc.arena import Arena
from weightsync.ipc.ledger import Ledger
from weightsync.nccl_bridge import commands as c
from weightsync.nccl_bridge.gloo import GlooCommunicator
from weightsync.nccl_bridge.groups import Groups
from weightsync.nccl_bridge.meetings import TorchMeeting
from weightsync.nccl_bridge.rendezvous import Rendezvous
from weightsync.testing import eventually
from weightsync.transports.exports import Checksums
from weightsync.transports.group import GroupOffer, GroupTicket

READERS = ("e/0", "e/1")
SECONDS = 20.0


def soon(seconds=SECONDS):
    return time.monotonic() + seconds


class World:
    """A bridge's groups, and the ranks of an engine that does as it is told."""

    def __init__(self, arena):
        self.arena = arena
        self.ledger = Ledger()
        one = threading.Lock()
        self.groups = Groups("n/0", arena, ledger=self.ledger, checksums=Checksums(arena), one_by_one=one)
        self.pool = ThreadPoolExecutor(8)
        self.ranks: list[GlooCommunicator] = []
        self.joining: Future[None] = Future()

    def offer(self, incarnation="1", readers=READERS, host="127.0.0.1", engine="e", join=True, helper="torch"):
        command = c.OfferGroup(engine=engine, incarnation=incarnation, readers=readers, host=host, helper=helper)
        offer = GroupOffer.unpack(self.groups.offer(command, deadline=soon()))
        if join:
            self.joining = self.pool.submit(self.groups.join, engine, deadline=soon())
        return offer

    def join(self, offer):
        """As the engine's ranks: the keys are those of torch's helper, under the group's name."""

        def one(rank):
            there = Rendezvous.connect(offer.host, offer.port, deadline=soon())
            meeting = TorchMeeting(there, offer.name, device="cpu")
            member = GlooCommunicator(generation=0, rank=rank + 1, world=offer.world, address="127.0.0.1")
            member.join(meeting, offer.name, deadline=soon())
            return member

        self.ranks = list(self.pool.map(one, range(offer.world - 1)))

    def take(self, sizes):
        """What each rank receives, asked for tensors of these sizes in turn."""

        def one(member):
            found = [bytearray(size) for size in sizes]
            for tensor in found:
                member.broadcast(memoryview(tensor), 0, deadline=soon())
            return [bytes(tensor) for tensor in found]

        return [self.pool.submit(one, member) for member in self.ranks]

    def export(self, sequence, nbytes=100):
        tickets: dict[str, bytes] = {}
        for reader in READERS:
            tickets |= self.groups.export("e", 0, nbytes, sequence, reader)
        return tickets

    def send(self, pieces, group, deadline=None):
        packed = np.array(pieces, dtype="<i8").tobytes()
        command = c.SendGroup(engine="e", group=group, slot=0, pieces=packed)
        self.groups.send(command, deadline=deadline or soon())

    def pending(self):
        return self.groups.pending(0)


@pytest.fixture
def world(tmp_path):
    with Arena.create(node="test", bridge=0, slots=1, slot_bytes=1000, directory=str(tmp_path)) as arena:
        made = World(arena)
        yield made
        made.groups._leave("e")
        for member in made.ranks:
            member.close(deadline=soon(1))
        made.pool.shutdown()


def test_ranks_get_the_tensors_they_ask_for(world):
    offer = world.offer()
    world.join(offer)
    world.arena.slot(0)[:100] = bytes(range(100))
    for sequence in (1, 2):
        tickets = world.export(sequence)
        assert {GroupTicket.unpack(ticket).group for ticket in tickets.values()} == {offer.name}
        assert world.pending() == READERS
        taken = world.take([10, 30])
        world.send([(5, 10), (64, 30)], offer.name)
        assert [one.result(SECONDS) for one in taken] == [[bytes(range(5, 15)), bytes(range(64, 94))]] * 2
        assert world.pending() == ()
    assert [(a.exports, a.closes) for a in world.ledger.accounts()] == [(2, 2)] * 2


def test_a_group_that_stands_is_offered_again(world):
    """Also before anybody joins it, which the bridge does when the engine is about to."""
    first = world.offer(join=False)
    assert world.offer() == first
    world.join(first)
    assert world.offer() == first


@pytest.mark.parametrize("order", ["first", "second"])
def test_engines_do_not_lose_their_group_with_another_engine(world, order):
    """Whichever was there first: each is in a group of its own, with sockets of its own."""
    other, mine = ("f", "e") if order == "second" else ("e", "f")
    for engine in ("e", "f"):
        world.join(world.offer(engine=engine, readers=(f"{engine}/0",)))
        if engine == mine:
            survivors = world.ranks
    world.groups._leave(other)
    offer = world.offer(engine=mine, readers=(f"{mine}/0",))
    world.groups.export(mine, 0, 100, 1, f"{mine}/0")
    world.ranks = survivors
    (taken,) = world.take([100])
    packed = np.array([(0, 100)], dtype="<i8").tobytes()
    world.groups.send(c.SendGroup(engine=mine, group=offer.name, slot=0, pieces=packed), deadline=soon())
    assert len(taken.result(SECONDS)[0]) == 100
    world.groups._leave(mine)


def test_a_broadcast_that_is_cut_off_cuts_off_no_other_group(world):
    """Of two groups the older has one under way, in which nobody takes part: the younger's sockets came up since."""
    older = world.offer()
    world.join(older)
    stuck = world.ranks
    younger = world.offer(engine="f", readers=("f/0",))
    world.join(younger)
    world.export(1)
    sending = world.pool.submit(world.send, [(0, 100)], older.name)
    assert eventually(lambda: world.groups._groups["e"].communicator._busy.locked())
    world.groups._leave("e")
    with pytest.raises(TransportError):
        sending.result(SECONDS)
    world.groups.export("f", 0, 100, 1, "f/0")
    (taken,) = world.take([100])
    packed = np.array([(0, 100)], dtype="<i8").tobytes()
    world.groups.send(c.SendGroup(engine="f", group=younger.name, slot=0, pieces=packed), deadline=soon())
    assert taken.result(SECONDS)
    world.groups._leave("f")
    world.ranks += stuck


@pytest.mark.parametrize("change", [{"incarnation": "2"}, {"readers": ("e/0",)}])
def test_another_engine_under_that_name_gets_another_group(world, change):
    first = world.offer()
    world.join(first)
    second = world.offer(**change)
    assert second.name != first.name
    with pytest.raises(TransportError):  # the old one has ended for those in it
        world.ranks[0].broadcast(memoryview(bytearray(1)), 0, deadline=soon())
    with pytest.raises(TransportBroken, match="is over"):
        world.send([(0, 1)], first.name)


def test_ranks_that_are_gone_break_the_group_and_the_next_is_another(world):
    first = world.offer()
    world.join(first)
    world.export(1)
    for member in world.ranks:
        member.close(deadline=soon(1))
    with pytest.raises(TransportBroken):
        world.send([(0, 100)], first.name)
    assert world.pending() == (), "nobody reads the slot any more"
    assert not world.groups._groups, "it is left, so that nobody else waits in it"
    second = world.offer()
    assert second.name != first.name
    world.join(second)
    world.export(2)
    taken = world.take([100])
    world.send([(0, 100)], second.name)
    assert all(one.result(SECONDS) for one in taken)


def test_a_group_that_is_being_left_holds_no_slot(world):
    """Its engine's end is no error of the bridge, which looks at all groups for every export."""
    world.join(world.offer())
    world.export(1)
    world.groups._groups["e"].sender.close()
    assert world.pending() == ()
    world.groups.revoke(0, "e/0")


def test_ranks_that_never_come_are_not_waited_for(world):
    offer = world.offer()
    world.export(1)
    start = time.monotonic()
    with pytest.raises(TransportError):
        world.send([(0, 100)], offer.name, deadline=soon(0.5))
    assert time.monotonic() - start < 5


def test_who_takes_the_hold_of_a_reader_away_ends_the_group(world):
    offer = world.offer()
    world.join(offer)
    world.export(1)
    sending = world.pool.submit(world.send, [(0, 100)], offer.name)  # and nobody takes it
    world.groups.revoke(0, "e/1")
    with pytest.raises(TransportClosed):
        sending.result(SECONDS)
    assert eventually(lambda: world.pending() == ())
    assert world.offer().name != offer.name


@pytest.mark.parametrize("pieces", [[(-1, 5)], [(0, 1001)], [(999, 2)]])
def test_pieces_outside_of_the_slot_are_refused(world, pieces):
    offer = world.offer()
    world.join(offer)
    world.export(1)
    with pytest.raises(LocalProtocolError, match="do not lie in a slot"):
        world.send(pieces, offer.name)


def test_a_group_that_is_over_fails_where_its_engine_is_asked(world):
    """And not where a bucket is exported, which would be the bridge's own fault."""
    (ticket,) = {GroupTicket.unpack(ticket).group for ticket in world.export(1).values()}
    with pytest.raises(TransportBroken, match="with engine e is over"):
        world.send([(0, 1)], ticket)


def test_an_engine_that_failed_is_not_met_in_that_group_again(world):
    """Though all was sent: small tensors leave at once over NCCL, and its ranks may not have taken the last of them."""
    offer = world.offer()
    world.join(offer)
    world.export(1)
    taken = world.take([10])
    world.send([(0, 10)], offer.name)
    assert all(one.result(SECONDS) for one in taken)
    assert world.pending() == ()
    world.groups.leave("e")
    assert world.offer(join=False).name != offer.name
    with pytest.raises(TransportBroken, match="is over"):
        world.send([(0, 1)], offer.name)


def test_leaving_ends_a_join_that_waits(world):
    world.offer()
    assert eventually(lambda: world.groups._groups["e"].communicator._busy.locked())
    world.groups.leave("e")
    with pytest.raises(TransportError):
        world.joining.result(SECONDS)
    assert eventually(lambda: not world.groups._groups)
    world.groups.leave("e")
    with pytest.raises(TransportBroken, match="is over"):
        world.groups.join("e", deadline=soon())


def test_a_group_is_joined_once(world):
    world.join(world.offer())
    world.joining.result(SECONDS)
    world.groups.join("e", deadline=soon(0.1))


def test_an_address_of_somebody_else_is_told(world):
    with pytest.raises(TransportBroken, match=r"192\.0\.2\.1"):
        world.offer(host="192.0.2.1")


def test_vllm_is_not_sent_to_from_host_memory(world):
    with pytest.raises(ConfigError, match="vllm joins groups over NCCL alone"):
        world.offer(helper="vllm")


@pytest.mark.parametrize("helper", ["torch", "vllm"])
def test_over_nccl_what_sglang_has_to_be_alike_in_is_asked_for(world, monkeypatch, helper):
    monkeypatch.delenv("NCCL_CUMEM_ENABLE", raising=False)
    slots: Any = object()  # not touched before something is sent
    groups = Groups("n/0", world.arena, slots, ledger=world.ledger, checksums=Checksums(world.arena), one_by_one=Lock())
    command = c.OfferGroup(engine="e", incarnation="1", readers=READERS, host="127.0.0.1", helper=helper)
    if helper == "torch":
        with pytest.raises(ConfigError, match="which SGLang sets to 0") as caught:
            groups.offer(command, deadline=soon())
        assert "start weightsyncd with NCCL_CUMEM_ENABLE=0" in (caught.value.hint or "")
        monkeypatch.setenv("NCCL_CUMEM_ENABLE", "0")
    assert GroupOffer.unpack(groups.offer(command, deadline=soon())).backend == "nccl"
