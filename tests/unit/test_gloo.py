"""The communicator, and what is gloo's own; what it shares with other transports is in tests/conformance."""

from __future__ import annotations

import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed

from weightsync.errors import LocalProtocolError, TransportBroken, TransportClosed, TransportTimeout
from weightsync.ipc.arena import Arena
from weightsync.nccl_bridge.gloo import GlooCommunicator
from weightsync.nccl_bridge.rendezvous import Rendezvous
from weightsync.nccl_bridge.sockets import cut, open_sockets
from weightsync.testing import no_leaks
from weightsync.transports import receiver
from weightsync.transports.gloo import GlooReceiver, GlooSender


def _soon(seconds: float = 20) -> float:
    return time.monotonic() + seconds


@contextmanager
def _joined(world: int):
    hosted = Rendezvous.host("127.0.0.1", deadline=_soon())
    members = [GlooCommunicator(generation=5, rank=rank, world=world, address="127.0.0.1") for rank in range(world)]

    def join(rank: int) -> None:
        meeting = hosted if rank == 0 else Rendezvous.connect("127.0.0.1", hosted.port, deadline=_soon())
        members[rank].join(meeting, "key", deadline=_soon())

    with ThreadPoolExecutor(world) as pool:
        list(pool.map(join, range(world)))
        yield members, pool
    for member in members:
        member.close(deadline=_soon(1))


def test_broadcast_from_any_root():
    with _joined(3) as (members, pool):
        for root in range(3):
            memories = [bytearray([rank]) * 100_001 for rank in range(3)]
            list(
                pool.map(
                    lambda rank, root=root, memories=memories: members[rank].broadcast(
                        memoryview(memories[rank]), root, deadline=_soon()
                    ),
                    range(3),
                )
            )
            assert all(memory == bytearray([root]) * 100_001 for memory in memories)
    assert not torch.distributed.is_initialized(), "the default group is the trainer's"


def test_a_broadcast_of_nothing_needs_nobody():
    with _joined(2) as (members, _):
        members[0].broadcast(memoryview(bytearray()), 0, deadline=_soon())


def test_alone_in_the_world():
    with _joined(1) as (members, _):
        members[0].broadcast(memoryview(bytearray(5)), 0, deadline=_soon())


def test_everything_is_bound_to_one_address():
    before = _listening()
    with _joined(2):
        found = _listening() - before
    assert found, "nothing listens?"
    assert {address for address, _ in found} == {"0100007F"}, found


def test_a_peer_that_does_not_come_is_a_timeout_and_the_communicator_stays_broken():
    with _joined(2) as (members, _):
        start = time.monotonic()
        with pytest.raises(TransportTimeout, match="broadcast of 4 bytes from rank 0, generation 5"):
            members[1].broadcast(memoryview(bytearray(4)), 0, deadline=_soon(0.3))
        assert time.monotonic() - start < 5
        with pytest.raises(TransportBroken, match="is broken since"):
            members[1].broadcast(memoryview(bytearray(4)), 0, deadline=_soon())


def test_a_peer_that_leaves_is_noticed():
    with _joined(2) as (members, pool):
        waiting = pool.submit(members[1].broadcast, memoryview(bytearray(4)), 0, deadline=_soon())
        members[0].close(deadline=_soon())
        with pytest.raises(TransportBroken, match=r"generation 5: (Read error|Connection closed)"):
            waiting.result(10)


def test_joining_alone_times_out():
    hosted = Rendezvous.host("127.0.0.1", deadline=_soon())
    member = GlooCommunicator(generation=1, rank=0, world=2, address="127.0.0.1")
    with pytest.raises(TransportTimeout, match="joining generation 1 as rank 0 of 2"):
        member.join(hosted, "key", deadline=_soon(0.3))
    member.close(deadline=_soon())


def test_members_with_another_key_do_not_meet():
    hosted = Rendezvous.host("127.0.0.1", deadline=_soon())
    members = [GlooCommunicator(generation=1, rank=rank, world=2, address="127.0.0.1") for rank in range(2)]
    meetings = [hosted, Rendezvous.connect("127.0.0.1", hosted.port, deadline=_soon())]
    with ThreadPoolExecutor(2) as pool:
        calls = [
            pool.submit(members[rank].join, meetings[rank], key, deadline=_soon(0.5))
            for rank, key in enumerate(("key", "guess"))
        ]
        for call in calls:
            with pytest.raises((TransportTimeout, TransportBroken)):
                call.result(10)
    for member in members:
        member.close(deadline=_soon())


def test_abort_while_joining(tmp_path):
    with no_leaks(directory=str(tmp_path)):  # no arena is made here, and others of these tests make some in /dev/shm
        hosted = Rendezvous.host("127.0.0.1", deadline=_soon())
        member = GlooCommunicator(generation=1, rank=0, world=2, address="127.0.0.1")
        with ThreadPoolExecutor(1) as pool:
            joining = pool.submit(member.join, hosted, "key", deadline=_soon())
            threading.Event().wait(0.1)
            start = time.monotonic()
            member.close(deadline=_soon(0.0))
            with pytest.raises(TransportClosed):
                joining.result(10)
        assert time.monotonic() - start < 5
        del hosted, member, joining


def test_a_rendezvous_that_has_gone_is_not_tried_again_and_again():
    """torch tries three times, with the whole time-out each: what waits behind would be taken for wedged."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    deadline = _soon(2.0)
    with pytest.raises(TransportBroken, match="refused"):
        Rendezvous.connect("127.0.0.1", port, deadline=deadline)
    assert time.monotonic() < deadline


def test_a_rendezvous_nobody_hosts():
    with pytest.raises((TransportTimeout, TransportBroken)):
        Rendezvous.connect("127.0.0.1", 1, deadline=_soon(0.3))
    with pytest.raises(TransportBroken, match="address of this node"):
        Rendezvous.host("203.0.113.1", deadline=_soon())


def test_misuse():
    with pytest.raises(LocalProtocolError):
        GlooCommunicator(generation=1, rank=2, world=2, address="127.0.0.1")
    member = GlooCommunicator(generation=1, rank=0, world=1, address="127.0.0.1")
    with pytest.raises(LocalProtocolError, match="not joined"):
        member.broadcast(memoryview(bytearray(1)), 0, deadline=_soon())
    with pytest.raises(LocalProtocolError, match="1 ranks"):
        member.broadcast(memoryview(bytearray(1)), 1, deadline=_soon())
    with pytest.raises(TransportTimeout):
        member.join(Rendezvous.host("127.0.0.1", deadline=_soon()), "key", deadline=_soon(-1))
    member.close(deadline=_soon())
    with pytest.raises(TransportClosed):
        member.broadcast(memoryview(bytearray(1)), 0, deadline=_soon())


def test_cutting_leaves_other_files_alone():
    import socket

    mine, other = socket.socketpair()
    with mine, other:
        sockets = open_sockets()
        assert cut(sockets) == 0, "only TCP connections are cut"
        mine.sendall(b"x")
        assert other.recv(1) == b"x"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        stale = frozenset((number, "socket:[1]") for number, _ in open_sockets())
        assert cut(stale) == 0, "a descriptor that now is something else"
        assert cut(open_sockets()) >= 1
        assert client.recv(1) == b""
        with socket.create_connection(server.getsockname()):
            pass  # the listening socket still listens


@pytest.fixture
def pair(tmp_path):
    with _joined(2) as (members, pool):
        arenas = [
            Arena.create(node="n", bridge=rank, slots=1, slot_bytes=1000, directory=str(tmp_path)) for rank in range(2)
        ]
        sender = GlooSender(members[0], arenas[0])
        made = receiver("gloo", communicator=members[1], arena=arenas[1], reader="b/0")
        assert isinstance(made, GlooReceiver)
        sender.offer("b/0")
        yield sender, made, arenas, pool
        made.close()
        sender.close()
        for arena in arenas:
            arena.close()


def test_receive_into_a_slot_of_the_callers_choice(pair):
    sender, into, arenas, pool = pair
    arenas[0].slot(0)[:4] = b"abcd"
    ticket = sender.export(0, 4, 3, ["b/0"])["b/0"]
    sending = pool.submit(sender.send, 0, deadline=_soon())
    arrival = into.receive_into(ticket, 0, deadline=_soon())
    sending.result(10)
    assert (arrival.sequence, arrival.nbytes, bytes(arenas[1].slot(0)[:4])) == (3, 4, b"abcd")


def test_a_receiver_waits_for_a_free_slot(pair):
    sender, into, _, pool = pair
    tickets = []
    for sequence in (1, 2):
        tickets.append(sender.export(0, 10, sequence, ["b/0"])["b/0"])
        sending = pool.submit(sender.send, 0, deadline=_soon())
        if sequence == 1:
            lease = into.receive(tickets[0], deadline=_soon())
            sending.result(10)
            continue
        with pytest.raises(TransportTimeout, match="all 1 slots"):
            into.receive(tickets[1], deadline=_soon(0.1))
        receiving = ThreadPoolExecutor(1)
        waiting = receiving.submit(into.receive, tickets[1], deadline=_soon())
        lease.release()
        waiting.result(10).release()
        receiving.shutdown()
        sending.result(10)


def test_tickets_of_another_group_are_refused(pair):
    sender, into, _, _ = pair
    for name in ("c/0",):
        sender.offer(name)
        with pytest.raises(TransportBroken, match="for reader c/0"):
            into.receive(sender.export(0, 10, 1, [name])[name], deadline=_soon())
    with pytest.raises(TransportBroken, match="for reader c/0"):
        into.accept(sender.offer("c/0"), deadline=_soon())


def test_a_failed_send_leaves_nobody_pending(pair):
    sender, _, _, _ = pair
    sender.export(0, 10, 1, ["b/0"])
    with pytest.raises(TransportTimeout):
        sender.send(0, deadline=_soon(0.2))
    assert sender.pending(0) == ()
    with pytest.raises(LocalProtocolError, match="nothing of slot 0"):
        sender.send(0, deadline=_soon())


def _listening() -> set[tuple[str, str]]:
    """Address (hexadecimal) and inode of this process's listening TCP sockets."""
    mine = {link.partition("[")[2].rstrip("]") for _, link in open_sockets()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{os.getpid()}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in mine:
                found.add((fields[1].partition(":")[0], fields[9]))
    return found
