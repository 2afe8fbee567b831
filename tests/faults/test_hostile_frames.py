"""A daemon that is fed anything: noise, mangled messages, and valid ones from strangers or at the wrong time."""

from __future__ import annotations

import collections
import random
import socket
import threading
import time
from typing import Any

import msgpack
import psutil
import pytest
import zmq

import weightsync.trainer.rank_memory
from tests.faults.kit import until
from tests.marks import slow
from tests.own import named
from tests.wire_examples import EXAMPLES
from weightsync.errors import ErrorRecord
from weightsync.nccl_bridge.rendezvous import Rendezvous
from weightsync.wire import messages as msg
from weightsync.wire.codec import decode_untrusted, encode
from weightsync.wire.trainer_link import TrainerLink

pytestmark = pytest.mark.faults

DIGEST = bytes(range(16))
MARK = 2**40  # ids of the questions that end a flood; no hostile frame has one so high
PATIENCE = 20_000  # milliseconds for the daemon to take or to answer something
GROWTH = 64  # MB that a daemon may grow by; 10,000 answers to somebody who does not read them included


class Stranger:
    """A connection of its own to a daemon, with nothing to say that makes sense."""

    def __init__(self, context, endpoint, *, reads=True):
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDTIMEO, PATIENCE)
        self.socket.setsockopt(zmq.RCVTIMEO, PATIENCE)
        self.socket.setsockopt(zmq.RCVHWM, 0 if reads else 10)
        self.socket.connect(endpoint)
        self.errors: list[ErrorRecord] = []
        self.heard: collections.Counter[str] = collections.Counter()

    def say(self, parts):
        self.socket.send_multipart(parts)

    def listen(self):
        """Take what has been answered by now."""
        while self.socket.poll(0):
            self._take()

    def catch_up(self, number):
        """Return once everything said so far has been read by the daemon."""
        self.say([encode(msg.StatusRequest(id=number))])
        answer = self._take()
        while not (isinstance(answer, msg.Status) and answer.id == number):
            answer = self._take()

    def wait_free(self):
        """Return once nothing that was begun holds the node any more, and nobody waits for it."""
        nothing = msg.Open(
            id=MARK, group="last", rank=0, world=1, model="none", version=1, pause="keep", timeout=60, layout=DIGEST
        )
        until(lambda: "no engine serves model 'none'" in self.ask(nothing), "the node is free")
        # bridges form communicators in turn: once this one is, none that was asked for before is under way
        until(self._joins, "the bridge has nothing else to do", 40)

    def _joins(self):
        """Whether the bridge becomes the only member of a communicator."""
        meeting = Rendezvous.host("127.0.0.1", deadline=time.monotonic() + 60)
        alone = msg.JoinRail(
            id=MARK, rail=0, generation=1, rank=0, world=1, host="127.0.0.1", port=meeting.port, key="alone", timeout=60
        )
        self.say([encode(alone)])
        answer = self._take()
        while answer.id != MARK or not isinstance(answer, msg.Executed | msg.ErrorReply):
            answer = self._take()
        return isinstance(answer, msg.Executed)

    def ask(self, message):
        """The words of the error that ends the push."""
        self.say([encode(message)])
        answer = self._take()
        while not (isinstance(answer, msg.Ended) and answer.id == message.id and answer.error is not None):
            answer = self._take()
        return answer.error.message

    def _take(self):
        answer = decode_untrusted(self.socket.recv())
        self.heard[type(answer).__name__] += 1
        if isinstance(answer, msg.ErrorReply | msg.Ended) and answer.error is not None:
            self.errors.append(answer.error)
        return answer


@pytest.fixture
def strangers(node):
    """Makes strangers, and sends them away in the end."""
    context = zmq.Context()
    made = []

    def make(count, **options):
        new = [Stranger(context, node.daemon.endpoint, **options) for _ in range(count)]
        made.extend(new)
        return new

    yield make
    for one in made:
        one.socket.close()
    context.term()


def instructions(rng):
    """What coordinators have done at a follower, aimed at what is there and at what is not."""
    engine, bucket, slot = rng.choice(["e1", "e2", "e9"]), rng.choice([0, 1, 2**40]), rng.choice([0, 1, 9])
    place = {"node": rng.choice([named("fault0"), "elsewhere"]), "bridge": rng.choice([0, 7]), "index": slot}
    export = {"bucket": bucket, "slot": place, "nbytes": rng.choice([0, 100, 2**50]), "engines": [engine]}
    return rng.choice(
        [
            {"type": "ProbeEngine", "engine": engine},
            {"type": "AcceptEngine", "engine": engine},
            {"type": "PauseEngine", "engine": engine, "mode": rng.choice(["keep", "nonsense"])},
            {"type": "BeginEngine", "engine": engine},
            {"type": "LoadBucket", "engine": engine, "bucket": bucket},
            {"type": "FinishEngine", "engine": engine},
            {"type": "VerifyEngine", "engine": engine},
            {"type": "ResumeEngine", "engine": "e9"},
            {"type": "AwaitRelease", "engine": engine, "bucket": bucket},
            {"type": "RevokeBucket", "engine": engine, "bucket": bucket},
            {"type": "RetireBridge", "node": named("fault0"), "bridge": 7, "reason": "because"},
            {"type": "ExportBucket", **export},
            {"type": "MakePlan"},
            {"type": "Nothing"},
            {"type": 5},
            {},
        ]
    )


def untimely(rng, opens):
    """A valid message, from somebody who has no business to send it, or now."""
    number = rng.randrange(2**20)
    push = f"push-{rng.randrange(4)}"
    tensors, sums = bytes(4 * rng.randrange(3)), bytes(8 * rng.randrange(3))
    match rng.randrange(14):
        case 0 if opens:
            return msg.Open(
                id=number,
                group=f"stranger-{rng.randrange(8)}",
                rank=rng.randrange(3),
                world=rng.randrange(2, 5),
                model=rng.choice(["default", "default", "another"]),
                version=rng.choice([0, 5, 2**60]),
                pause=rng.choice(["keep", "none"]),
                timeout=rng.choice([0.0, 1.0, 1e9]),
                layout=rng.randbytes(16),
            )
        case 1:
            return msg.Describe(id=number, layout=rng.randbytes(rng.randrange(100)))
        case 2 | 3:
            return msg.Filled(id=number, bucket=rng.randrange(12), nbytes=2**50, tensors=tensors, fingerprints=sums)
        case 4:
            return msg.Failed(id=number, error=ErrorRecord(kind="PushAborted", message="I give up", rank=0))
        case 5:
            return msg.Stopped(id=number)
        case 6:
            return msg.Heartbeat()
        case 7:
            return msg.Attach(id=number, node=f"n{rng.randrange(9)}")
        case 8 | 9:
            return msg.Execute(
                id=number,
                push=push,
                model="default",
                version=number,
                instruction=instructions(rng),
                timeout=rng.choice([0.0, 0.5, 1e9]),
                plan=rng.choice([None, DIGEST]),
                manifest=rng.choice([None, None, b"manifest"]),
            )
        case 10:
            return msg.Receive(
                id=number, push=push, bucket=0, rail=rng.choice([0, 9]), slot=rng.choice([0, 9]), ticket=b"?", timeout=1
            )
        case 11:
            return msg.Release(push=push)
        case 12:
            return msg.JoinRail(
                id=number,
                rail=rng.choice([0, 9]),
                generation=number,
                rank=rng.randrange(3),
                world=rng.randrange(4),
                host="127.0.0.1",
                port=rng.choice([1, 70000]),
                key="k",
                timeout=rng.choice([0.0, 0.2, 1e9]),
            )
        case _:
            return rng.choice(EXAMPLES if opens else EXAMPLES[1:])


def mangled(rng, frame):
    """Some bytes changed, lost, or too many."""
    data = bytearray(frame)
    match rng.randrange(4):
        case 0:
            for _ in range(rng.randrange(1, 5)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        case 1:
            del data[rng.randrange(len(data)) :]
        case 2:
            data += rng.randbytes(rng.randrange(1, 20))
        case _:
            at = rng.randrange(len(data))
            data[at:at] = rng.randbytes(rng.randrange(1, 6))
    return bytes(data)


def nonsense(rng):
    """MessagePack, but no message."""
    return rng.choice(
        [
            b"",
            b"\xc1",
            b"\xdf\xff\xff\xff\xff",
            b"\xdd\x00\x0f\x00\x00" + b"\xc0" * 100,
            b"\x91" * 200 + b"\xc0",
            msgpack.packb([1, 2, 3]),
            msgpack.packb({"v": 1}),
            msgpack.packb({"v": 1, "type": "no_such_type", "id": 3}),
            msgpack.packb({"v": 1, "type": ["open"], "id": 3}),
            msgpack.packb({"v": 1, "type": "filled", "id": -1, "bucket": "x"}),
            msgpack.packb({"v": 1, "type": "stopped", "id": 2**64 - 1}),
            msgpack.packb({"v": 1, "type": "release", "push": "p" * 257}),
            msgpack.packb({"v": 1, "type": "release", "push": "p" * 100_000}),
        ]
    )


def other_version(rng):
    return msgpack.packb({"v": rng.choice([0, 2, 77, -1, 2**63, 1.0, True, "1", None, [1]]), "type": "stopped"})


def hostile(rng, opens):
    """The frames of one message; none of them calls for a push unless it `opens`."""
    kind = rng.random()
    if kind < 0.2:
        return [rng.randbytes(rng.randrange(200))]
    if kind < 0.3:
        return [nonsense(rng)]
    if kind < 0.35:
        return [other_version(rng)]
    if kind < 0.65:
        return [mangled(rng, encode(untimely(rng, opens)))]
    if kind < 0.7:
        return [encode(untimely(rng, opens)) for _ in range(rng.randrange(2, 6))]
    return [encode(untimely(rng, opens))]


def flood(rng, strangers, count, *, opens):
    """`count` hostile messages, in turns; returns when the daemon has read them all."""
    for number in range(count):
        stranger = strangers[number % len(strangers)]
        stranger.say(hostile(rng, opens))
        if number % 250 == 0:
            stranger.listen()
        if number % 4000 == 3999 or number == count - 1:
            for one in strangers:
                one.catch_up(MARK + number)


def megabytes(node):
    return int(psutil.Process(node.daemon.pid).memory_info().rss / 1e6)


@pytest.mark.parametrize("count", [20_000, slow(100_000)])
def test_many_hostile_frames(node, strangers, count):
    rng = random.Random(20260101)
    crowd = strangers(8)
    flood(rng, crowd, count // 5, opens=True)
    before = megabytes(node)
    flood(rng, crowd, count // 5, opens=True)  # one push after another is opened, and nobody takes part
    crowd[0].wait_free()
    flood(rng, crowd, 2 * count // 5, opens=False)  # now the node is free for whoever wants to command it
    (deaf,) = strangers(1, reads=False)
    for _ in range(count // 5):
        deaf.say([rng.randbytes(20)])
    flood(rng, crowd, 100, opens=True)
    after = megabytes(node)
    assert node.daemon.process.poll() is None
    assert node.status().pid == node.daemon.pid
    assert after - before < GROWTH, f"{before} MB became {after} MB"

    errors = [error for one in crowd for error in one.errors]
    assert sum(one.heard["ErrorReply"] for one in crowd) > 0.3 * count
    assert {"CodecError", "RemoteProtocolError", "PushRefused"} <= {error.kind for error in errors}
    versions = [e for e in errors if "protocol version" in e.message and "is not spoken here" in e.message]
    assert len(versions) > count / 100
    assert {e.hint for e in versions} == {"versions spoken: 1"}
    assert sum("a message has one frame, not" in e.message for e in errors) > count / 100
    assert any("unknown to protocol version 1" in e.message for e in errors)
    assert any("a daemon does not take messages of type Welcome" in e.message for e in errors)
    assert not {e.message for e in errors if "weightsyncd failed" in e.message}
    # nothing that the strangers began goes on once they are silent
    crowd[0].wait_free()
    until(lambda: node.status().waiting == 0, "calls of those who are silent by now are dropped")
    until(lambda: None not in [b.pid for b in node.status().bridges], "bridges that were kept waiting are replaced")
    until(lambda: not any(node.info(e)["paused"] for e in node.engines), "engines serve on")
    assert node.torn_or_whole(node.before) == set()


def test_hostile_frames_do_not_harm_a_push_under_way(node, strangers):
    rng = random.Random(20260102)
    crowd = strangers(8)
    ranks = node.start_ranks(2)
    bridges = node.bridge_pids()
    node.push_all(ranks, node.next_version(), only={0: {"gate": ["read", 9]}, 1: {"gate": ["read", 2]}})
    ranks[1].wait_at("read")
    flood(rng, crowd, 5_000, opens=True)
    ranks[1].go()
    flood(rng, crowd, 5_000, opens=True)  # while buckets are filled, exported and loaded
    ranks[0].wait_at("read")
    assert node.bridge_pids() == bridges, "a bridge was lost over it"
    ranks[0].go()
    reports = [rank.report() for rank in ranks]
    assert all(report["complete"] for report in reports)
    for engine in node.engines:
        node.serves(engine, "C")
    refused = {error.message for one in crowd for error in one.errors if error.kind == "PushRefused"}
    assert f"node {node.daemon.name} is busy with a push of its own" in refused
    assert any("by another trainer is under way" in message for message in refused)
    crowd[0].wait_free()
    until(lambda: node.status().waiting == 0, "calls of those who are silent by now are dropped")


def test_noise_below_the_messages(node):
    """Bytes that are not even ZeroMQ's."""
    rng = random.Random(20260103)
    path = node.daemon.endpoint.removeprefix("ipc://")
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
    lines = []
    for number in range(100):
        line = socket.socket(socket.AF_UNIX)
        line.connect(path)
        lines.append(line)
        line.sendall([b"", rng.randbytes(300), greeting, greeting + rng.randbytes(300)][number % 4])
    assert node.status().pid == node.daemon.pid
    for line in lines:
        line.close()


class StutteringLink(TrainerLink):
    """A rank's link that says everything twice, and after the end all of it again, and that it gives up."""

    said: list[msg.Message]

    def send(self, message):
        self.said = [*getattr(self, "said", []), message]
        super().send(message)
        super().send(message)
        if isinstance(message, msg.Stopped):
            giving_up = msg.Failed(id=message.id, error=ErrorRecord(kind="PushAborted", message="late", rank=0))
            for late in (giving_up, *self.said, giving_up):
                super().send(late)
            self.said = []


class ReopeningLink(TrainerLink):
    """A rank's link that calls for a push again when it has ended."""

    call: msg.Open

    def send(self, message):
        super().send(message)
        if isinstance(message, msg.Open):
            self.call = message
        if isinstance(message, msg.Stopped):
            super().send(self.call)


@pytest.fixture
def speak(node, monkeypatch):
    """Sets the kind of link by which this process pushes."""
    memory = weightsync.trainer.rank_memory.memory()
    memory.close_links()
    yield lambda kind: monkeypatch.setattr(weightsync.trainer.rank_memory, "TrainerLink", kind)
    memory.close_links()


def test_what_is_said_twice_counts_once(node, speak):
    speak(StutteringLink)
    engine = node.engines[0]
    weights = node.weights("C")
    total = sum(w.numel() * w.element_size() for w in weights.values())
    reports: list[Any] = []
    for _ in range(2):  # with an unknown layout, and with a known one
        node.delay(engine, "/finish")
        pushing = threading.Thread(target=lambda: reports.append(node.push("C")))
        pushing.start()
        node.wait_state("committing")
        filled = node.status().push.filled_bytes
        node.clear()
        pushing.join(20)
        assert filled == total
        report = reports.pop()
        assert report.bytes == total
        node.holds("C", report)
        node.wait_idle()


def test_an_open_that_is_repeated_after_the_end_is_refused(node, speak):
    speak(ReopeningLink)
    since = node.log_length()
    node.push("C")
    node.wait_log("is not above version", since=since)
    node.wait_idle()
    for engine in node.engines:
        node.serves(engine, "C")
