"""The bridge process itself, spoken to over its pipe."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import msgpack
import pytest

from weightsync.errors import CodecError, TransportBroken, TransportClosed, TransportTimeout, WeightSyncError
from weightsync.ipc.arena import Arena
from weightsync.nccl_bridge import commands as c
from weightsync.nccl_bridge import frames
from weightsync.plan.shares import MemberPart
from weightsync.testing import eventually
from weightsync.transports import receiver

if TYPE_CHECKING:
    from collections.abc import Iterator

HEX = "0123456789abcdef"
EXPORT = c.Export(slot=0, nbytes=5, sequence=1)


class Process:
    """A bridge and the daemon's end of its pipe."""

    def __init__(self, directory: Path, node: str = "n", **options: int) -> None:
        self.directory = directory
        self.node = node
        self.pipe, theirs = socket.socketpair()
        self.pipe.settimeout(20)
        self._next = 0
        self._answers: dict[int, frames.Response] = {}
        words = {"slots": 2, "slot-bytes": 4096} | options
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "weightsync.nccl_bridge"]
                + ["--fd", str(theirs.fileno()), "--node", node, "--index", "0", "--incarnation", HEX]
                + ["--shm-dir", str(directory), "--log-level", "error"]
                + [word for key, value in words.items() for word in (f"--{key}", str(value))],
                pass_fds=(theirs.fileno(),),
                env=os.environ | {"PYTHONPATH": os.getcwd()},
            )

    def send(self, command: c.AnyCommand, timeout: float = 20) -> int:
        self._next += 1
        self.pipe.sendall(frames.encode(frames.Request(id=self._next, timeout=timeout, command=command)))
        return self._next

    def answer(self, number: int) -> c.AnyReply:
        while number not in self._answers:
            (length,) = struct.unpack("<I", self._exactly(4))
            response = frames.decode_response(self._exactly(length))
            self._answers[response.id] = response
        response = self._answers.pop(number)
        if response.error is not None:
            raise response.error.error()
        assert response.reply is not None
        return response.reply

    def call(self, command: c.AnyCommand, timeout: float = 20) -> c.AnyReply:
        return self.answer(self.send(command, timeout))

    def arenas(self) -> list[str]:
        return [path.name for path in self.directory.iterdir() if f"-{self.node}-" in path.name]

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.pipe.recv(count - len(data))
            assert more, "the bridge has gone"
            data += more
        return data


@pytest.fixture
def bridge(tmp_path) -> Iterator[Process]:
    with Process(tmp_path) as process:
        yield process


@pytest.fixture
def two(tmp_path) -> Iterator[tuple[Process, Process]]:
    """Two bridges that have joined."""
    with ExitStack() as stack:
        processes = [stack.enter_context(Process(tmp_path, node)) for node in ("a", "b")]
        _join(processes)
        yield processes[0], processes[1]


def _join(processes: list[Process], generation: int = 1) -> None:
    hosted = processes[0].call(c.Host(generation=generation, host="127.0.0.1"))
    assert isinstance(hosted, c.Hosted)
    numbers = [
        process.send(
            c.Join(
                generation=generation,
                rank=rank,
                world=len(processes),
                host="127.0.0.1",
                port=hosted.port,
                address="127.0.0.1",
                key="secret",
            )
        )
        for rank, process in enumerate(processes)
    ]
    for process, number in zip(processes, numbers, strict=True):
        assert process.answer(number) == c.Done()


def _ready(process: Process) -> c.Ready:
    ready = process.call(c.Hello())
    assert isinstance(ready, c.Ready)
    return ready


def _exported(process: Process, command: c.Export) -> c.Exported:
    exported = process.call(command)
    assert isinstance(exported, c.Exported)
    return exported


def _uses_torch(process: Process) -> bool:
    return "libtorch" in Path(f"/proc/{process.process.pid}/maps").read_text()


def test_hello_offers_the_arena(bridge):
    ready = _ready(bridge)
    assert (ready.pid, ready.incarnation, ready.slots, ready.slot_bytes) == (bridge.process.pid, HEX, 2, 4096)
    with Arena.attach(ready.offer, writable=True) as arena:
        arena.slot(1)[:1] = b"x"
    assert bridge.arenas() == [f"weightsync-{os.geteuid()}-n-0-{HEX}"]


def test_a_reader_of_this_node(bridge):
    with Arena.attach(_ready(bridge).offer, writable=True) as arena:
        arena.slot(0)[:5] = b"hello"
    offered = bridge.call(c.Offer(reader="e/0"))
    assert isinstance(offered, c.Offered)
    exported = _exported(bridge, c.Export(slot=0, nbytes=5, sequence=1, readers=("e/0",)))
    assert bridge.call(c.Pending(slot=0)) == c.PendingReaders(readers=("e/0",))
    waiting = bridge.send(c.AwaitReleased(slot=0, readers=("e/0",)))
    reader = receiver("shm")
    reader.accept(offered.offer, deadline=time.monotonic() + 5)
    with reader.receive(exported.tickets["e/0"], deadline=time.monotonic() + 5) as lease:
        assert bytes(lease.view) == b"hello"
    reader.close()
    assert bridge.answer(waiting) == c.PendingReaders(readers=())
    books = bridge.call(c.Ledger())
    assert isinstance(books, c.LedgerBooks)
    assert [(a.reader, a.exports, a.opens, a.closes, a.revoked) for a in books.accounts] == [("e/0", 1, 1, 1, 0)]
    assert not _uses_torch(bridge), "a bridge that joined nothing must stay small"


def test_a_wait_for_a_slot_ends_in_time_or_by_revocation(bridge):
    bridge.call(c.Offer(reader="e/0"))
    _exported(bridge, c.Export(slot=0, nbytes=5, sequence=1, readers=("e/0",)))
    with pytest.raises(TransportTimeout, match="held by e/0"):
        bridge.call(c.AwaitReleased(slot=0, readers=("e/0",)), timeout=0.1)
    waiting = bridge.send(c.AwaitReleased(slot=0, readers=("e/0",)))
    assert bridge.call(c.Revoke(reader="e/0")) == c.Done()
    assert bridge.answer(waiting) == c.PendingReaders(readers=())


@pytest.mark.parametrize(
    "command",
    [
        c.Pending(slot=2),
        c.Export(slot=9, nbytes=5, sequence=1),
        c.Export(slot=0, nbytes=5000, sequence=1),
        c.Export(slot=0, nbytes=5, sequence=1, readers=("stranger/0",)),
        c.Export(slot=0, nbytes=5, sequence=1, peers=("b/0",)),
        c.Send(slot=0, sequence=1),
        c.Receive(slot=0, ticket=b"x"),
    ],
)
def test_what_cannot_be_done_is_answered(bridge, command):
    with pytest.raises(WeightSyncError):
        bridge.call(command)
    assert _ready(bridge)


def test_stop(bridge):
    _ready(bridge)
    assert bridge.call(c.Stop()) == c.Done()
    assert bridge.process.wait(10) == 0
    assert bridge.arenas() == []


def test_it_does_not_outlive_the_daemon(bridge):
    _ready(bridge)
    assert bridge.arenas()
    bridge.pipe.close()
    bridge.process.wait(10)
    assert bridge.arenas() == []


def test_signals_of_the_terminal_are_left_to_the_daemon(bridge):
    _ready(bridge)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        bridge.process.send_signal(number)
    assert _ready(bridge)


@pytest.mark.parametrize(
    "frame", [b"\xff\xff\xff\xff", struct.pack("<I", 0), struct.pack("<I", 3) + b"abc", struct.pack("<I", 1) + b"\x80"]
)
def test_nonsense_ends_it(bridge, frame):
    _ready(bridge)
    bridge.pipe.sendall(frame)
    assert bridge.process.wait(10) == 1
    assert bridge.arenas() == []


def test_half_a_frame_and_the_end(bridge):
    _ready(bridge)
    bridge.pipe.sendall(struct.pack("<I", 100) + b"abc")
    bridge.pipe.close()
    assert bridge.process.wait(10) == 1
    assert bridge.arenas() == []


def test_no_room_for_the_arena_is_told(tmp_path):
    with Process(tmp_path / "missing") as process, pytest.raises(WeightSyncError, match="missing"):
        process.call(c.Hello())


def test_a_slot_goes_to_another_node(two):
    first, second = two
    with Arena.attach(_ready(first).offer, writable=True) as arena:
        arena.slot(0)[:5] = b"hello"
    exported = _exported(first, c.Export(slot=0, nbytes=5, sequence=1, peers=("b/0",)))
    assert first.call(c.Pending(slot=0)) == c.PendingReaders(readers=("b/0",))
    sending = first.send(c.Send(slot=0, sequence=1))
    received = second.call(c.Receive(ticket=exported.peer_tickets["b/0"], slot=1, sequence=44))
    assert isinstance(received, c.Received)
    assert (received.sequence, received.nbytes) == (44, 5)
    assert first.answer(sending) == c.Done()
    assert first.call(c.Pending(slot=0)) == c.PendingReaders(readers=())
    second.call(c.Offer(reader="e/0"))
    onwards = _exported(second, c.Export(slot=1, nbytes=5, sequence=44, readers=("e/0",)))
    assert onwards.checksum == exported.checksum
    with Arena.attach(_ready(second).offer, writable=False) as arena:
        assert bytes(arena.slot(1)[:5]) == b"hello"


def test_questions_are_answered_and_exports_made_while_a_send_blocks(two):
    first, second = two
    _exported(first, c.Export(slot=0, nbytes=5, sequence=1, peers=("b/0",)))
    sending = first.send(c.Send(slot=0, sequence=1))
    start = time.monotonic()
    assert first.call(c.Pending(slot=0)) == c.PendingReaders(readers=("b/0",))
    assert isinstance(first.call(c.Ledger()), c.LedgerBooks)
    assert first.call(c.Revoke(reader="nobody/0")) == c.Done()
    first.call(c.Offer(reader="e/0"))
    _exported(first, c.Export(slot=1, nbytes=5, sequence=1, readers=("e/0",)))
    assert time.monotonic() - start < 5
    assert sending not in first._answers, "the send should block: nobody receives"
    # Leaving ends it, and what is queued behind it.
    queued = first.send(c.Receive(ticket=b"x" * 50, slot=1))
    leaving = first.send(c.Leave())
    for number in (sending, queued):
        with pytest.raises(TransportClosed):
            first.answer(number)
    assert first.answer(leaving) == c.Done()
    assert first.call(c.Pending(slot=0)) == c.PendingReaders(readers=())
    # The other side notices, and both form another generation.
    other = _exported(second, c.Export(slot=0, nbytes=5, sequence=1, peers=("a/0",)))
    assert other.peer_tickets
    with pytest.raises(TransportBroken):
        second.call(c.Send(slot=0, sequence=1))
    _join([second, first], generation=2)
    exported = _exported(second, c.Export(slot=0, nbytes=5, sequence=2, peers=("a/0",)))
    sending = second.send(c.Send(slot=0, sequence=2))
    assert isinstance(first.call(c.Receive(ticket=exported.peer_tickets["a/0"], slot=0)), c.Received)
    assert second.answer(sending) == c.Done()


def test_a_join_is_interrupted(bridge):
    hosted = bridge.call(c.Host(generation=1, host="127.0.0.1"))
    assert isinstance(hosted, c.Hosted)
    joining = bridge.send(
        c.Join(generation=1, rank=0, world=2, host="127.0.0.1", port=hosted.port, address="127.0.0.1", key="k")
    )
    assert eventually(lambda: _uses_torch(bridge))
    threading.Event().wait(0.2)
    leaving = bridge.send(c.Leave())
    with pytest.raises(TransportClosed):
        bridge.answer(joining)
    assert bridge.answer(leaving) == c.Done()


def test_a_receive_that_fails_in_time_leaves_the_bridge_alive(two):
    first, second = two
    exported = _exported(first, c.Export(slot=0, nbytes=5, sequence=1, peers=("b/0",)))
    with pytest.raises(TransportTimeout):
        second.call(c.Receive(ticket=exported.peer_tickets["b/0"], slot=0), timeout=0.3)
    with pytest.raises(CodecError):
        second.call(c.Receive(ticket=b"garbage", slot=0))
    assert _ready(second)


def _runs(*runs: tuple[int, int]) -> bytes:
    return struct.pack(f"<{2 * len(runs)}q", *(number for run in runs for number in run))


def _together(two: tuple[Process, Process], *commands: c.Exchange) -> list[c.AnyReply]:
    numbers = [process.send(command) for process, command in zip(two, commands, strict=True)]
    return [process.answer(number) for process, number in zip(two, numbers, strict=True)]


def test_two_bridges_give_each_other_their_parts(two):
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(Arena.attach(_ready(one).offer, writable=True)) for one in two)
        ours.slot(1)[:12] = b"ab--ef--ij--"
        theirs.slot(0)[:12] = b"--cd--gh--kl"
        parts = (
            MemberPart(root=0, runs=_runs((0, 2), (4, 2), (8, 2))),
            MemberPart(root=1, runs=_runs((2, 2), (6, 2), (10, 2))),
        )
        _together(
            two,
            c.Exchange(slot=1, generation=1, token=7, parts=parts),
            c.Exchange(slot=0, generation=1, token=7, parts=parts),
        )
        assert bytes(ours.slot(1)[:12]) == bytes(theirs.slot(0)[:12]) == b"abcdefghijkl"
        # all of it from the other, as one run: what lies behind it stays
        theirs.slot(1)[:12] = b"whole bucket"
        theirs_alone = (MemberPart(root=1, runs=_runs((0, 11))),)
        _together(
            two,
            c.Exchange(slot=0, generation=1, token=8, parts=theirs_alone),
            c.Exchange(slot=1, generation=1, token=8, parts=theirs_alone),
        )
        assert bytes(ours.slot(0)[:11]) == b"whole bucke"
        assert ours.slot(0)[11] == 0


NO_RUNS = [
    b"",
    b"x" * 15,
    _runs((-1, 2)),
    _runs((0, 0)),
    _runs((4090, 7)),
    _runs((0, 2), (1, 2)),
    _runs((2**62, 2**62)),
]


def test_parts_that_cannot_be_are_refused_before_anything_is_sent(two):
    for runs in NO_RUNS:
        with pytest.raises(WeightSyncError, match="part of rank 0"):
            two[0].call(c.Exchange(slot=0, generation=1, token=1, parts=(MemberPart(root=0, runs=runs),)))
    with pytest.raises(WeightSyncError, match="no rank 2"):
        two[0].call(c.Exchange(slot=0, generation=1, token=1, parts=(MemberPart(root=2, runs=_runs((0, 1))),)))
    two[0].call(c.Offer(reader="e/0"))
    _exported(two[0], c.Export(slot=0, nbytes=5, sequence=1, readers=("e/0",)))
    with pytest.raises(WeightSyncError, match="still held by e/0"):
        two[0].call(c.Exchange(slot=0, generation=1, token=1, parts=(MemberPart(root=0, runs=_runs((0, 1))),)))


def test_parts_of_two_exchanges_are_not_taken_for_each_other(two):
    part = (MemberPart(root=0, runs=_runs((0, 4))),)
    numbers = [one.send(c.Exchange(slot=0, generation=1, token=token, parts=part)) for token, one in enumerate(two)]
    assert two[0].answer(numbers[0]) == c.Done(), "the root does not hear of it here: the daemons do"
    with pytest.raises(TransportBroken, match="another exchange"):
        two[1].answer(numbers[1])


def test_it_dies_with_the_daemon_even_inside_a_collective(two):
    first, second = two
    exported = _exported(first, c.Export(slot=0, nbytes=5, sequence=1, peers=("b/0",)))
    second.send(c.Receive(ticket=exported.peer_tickets["b/0"], slot=0))
    assert _ready(second)
    second.pipe.close()
    second.process.wait(10)
    assert second.arenas() == []


def test_frames_are_bounded_and_validated(monkeypatch):
    monkeypatch.setattr(frames, "MAX_FRAME", 2**20)
    for length in (0, frames.MAX_FRAME + 1):
        with pytest.raises(CodecError):
            frames.frame_length(struct.pack("<I", length))
    assert frames.frame_length(struct.pack("<I", frames.MAX_FRAME)) == frames.MAX_FRAME
    with pytest.raises(CodecError):
        frames.encode(frames.Request(id=1, timeout=1.0, command=c.Receive(ticket=bytes(frames.MAX_FRAME), slot=0)))
    for body in (
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 5000,
        msgpack.packb({"id": 1, "timeout": 1.0, "command": {"type": "reboot"}}),
        msgpack.packb({"id": -1, "timeout": 1.0, "command": {"type": "hello"}}),
        msgpack.packb({"id": 1, "timeout": -1.0, "command": {"type": "hello"}}),
        msgpack.packb({"id": 1, "timeout": 1.0, "command": {"type": "pending", "slot": "0"}}),
        msgpack.packb({"id": 1, "timeout": 1.0, "command": {"type": "offer", "reader": "x" * 300}}),
    ):
        with pytest.raises(CodecError):
            frames.decode_request(body)
    for body in (msgpack.packb({"id": 1}), msgpack.packb({"id": 1, "reply": {"type": "hosted", "port": 0}})):
        with pytest.raises(CodecError):
            frames.decode_response(body)


@pytest.mark.parametrize("kind", c.AnyCommand.__args__)
def test_every_command_survives_the_pipe(kind):
    samples: dict[str, object] = {
        "checksum": 7,
        "reader": "e/0",
        "transport": "mapped",
        "slot": 1,
        "nbytes": 2,
        "sequence": 3,
        "readers": ("e/0", "e/1"),
        "peers": ("b/0",),
        "generation": 4,
        "parcel": 4096,
        "turn": 1,
        "turns": 2,
        "manifest": b"m" * 16,
        "whole": True,
        "places": b"p" * 16,
        "exposures": b"x" * 16,
        "ranks": (0, 3),
        "host": "127.0.0.1",
        "rank": 0,
        "world": 2,
        "port": 5,
        "address": "127.0.0.1",
        "key": "k",
        "ticket": b"t",
        "token": 6,
        "engine": "e0",
        "incarnation": "x",
        "helper": "vllm",
        "join": True,
        "group": "g",
        "pieces": b"p" * 16,
        "parts": (MemberPart(root=0, runs=b"r" * 16),),
    }
    command = kind(**{name: samples[name] for name in kind.__struct_fields__})
    request = frames.Request(id=1, timeout=2.5, command=command)
    assert frames.decode_request(frames.encode(request)[frames.HEADER.size :]) == request
    assert issubclass(kind.reply, c.Reply)
