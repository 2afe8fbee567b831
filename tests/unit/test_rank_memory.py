"""What a trainer's process keeps mapped between pushes, and when it lets go."""

from __future__ import annotations

import multiprocessing
import threading
from typing import Any

import pytest
import zmq

from weightsync.ipc import gone
from weightsync.ipc.arena import Arena, DeviceMemory
from weightsync.ipc.cuda import DeviceSlots
from weightsync.testing import eventually
from weightsync.trainer.rank_memory import RankMemory, memory
from weightsync.wire.codec import decode_untrusted
from weightsync.wire.messages import Heartbeat


class Slots:
    """Slots on a GPU, as far as letting go of them is concerned."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def opened(monkeypatch):
    made: list[Slots] = []

    def open_(offer, device):
        made.append(Slots())
        return made[-1]

    monkeypatch.setattr(DeviceSlots, "open", open_)
    monkeypatch.setattr(gone, "_EVERY", 0.01)

    class Cupy:
        class cuda:
            class runtime:
                setDevice = staticmethod(lambda device: None)

    monkeypatch.setattr(gone, "cupy", Cupy)
    return made


def make(directory, *, bridge: int = 0) -> Arena:
    on_gpu = DeviceMemory(gpu="aa", handle=bytes(64))
    return Arena.create(node="n", bridge=bridge, slots=1, slot_bytes=100, directory=str(directory), memory=on_gpu)


def test_arenas_are_mapped_once_and_kept(tmp_path, opened):
    kept = RankMemory()
    with make(tmp_path) as arena:
        offer = arena.offer()
        for _ in range(2):
            with kept.push():
                (mapped,) = kept.map_arenas((offer,))
                assert kept.map_slots(offer, 0) is opened[0]
        assert not mapped.closed
        assert len(opened) == 1


def test_what_a_dead_bridge_had_is_let_go_of_without_a_push(tmp_path, opened):
    kept = RankMemory()
    with make(tmp_path) as arena:
        with kept.push():
            kept.map_arenas((arena.offer(),))
            kept.map_slots(arena.offer(), 0)
            arena.unlink()
            assert not opened[0].closed.wait(0.1), "a push that uses it is under way"
        assert opened[0].closed.is_set()
    with make(tmp_path) as arena:
        with kept.push():
            kept.map_arenas((arena.offer(),))
            kept.map_slots(arena.offer(), 0)
        assert not opened[1].closed.wait(0.1)
        arena.unlink()
        assert opened[1].closed.wait(5)
    assert eventually(lambda: not any(t.name == "weightsync-lookout" for t in threading.enumerate()))


def test_a_successor_replaces_what_was_mapped_when_no_push_needs_it(tmp_path, opened):
    kept = RankMemory()
    with make(tmp_path) as old, make(tmp_path) as new:
        with kept.push():
            kept.map_arenas((old.offer(),))
            kept.map_slots(old.offer(), 0)
            with kept.push():
                kept.map_arenas((new.offer(),))
                kept.map_slots(new.offer(), 0)
            assert not opened[0].closed.is_set()
        assert opened[0].closed.is_set()
        assert not opened[1].closed.is_set()


def _child(pipe, parent: int) -> None:
    pipe.send(id(memory()) != parent)


def test_a_forked_child_begins_with_none():
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, id(memory())))
    process.start()
    assert ours.recv()
    process.join(10)
    assert process.exitcode == 0


class Copied:
    """What exposes weights in a copy, as far as the memory knows it."""

    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


def exposing_memory(*keys: bytes) -> Any:
    memory: Any = RankMemory()
    memory.programs.update(dict.fromkeys(keys))
    return memory


def test_what_was_exposed_is_for_one_push_at_a_time():
    memory, first = exposing_memory(b"plan" + bytes(16)), Copied()
    memory.give_exposed(b"plan" + bytes(16), first)
    assert memory.take_exposed(b"plan" + bytes(16)) is first
    assert memory.take_exposed(b"plan" + bytes(16)) is None, "two pushes would measure in the same memory"
    assert not first.closed


def test_of_one_layout_one_copy_is_kept():
    """Another plan of it (slots of another size, say) has another copy: there may be no room for both."""
    old, new, other = b"old " + bytes(16), b"new " + bytes(16), b"old " + bytes(15) + b"\1"
    memory, copies = exposing_memory(old, new, other), [Copied() for _ in range(3)]
    for key, copy in zip((old, other, new), copies, strict=True):
        memory.give_exposed(key, copy)
    assert [copy.closed for copy in copies] == [True, False, False]
    memory.forget_exposed(old)
    assert [copy.closed for copy in copies] == [True, False, True]


def test_nothing_is_kept_for_a_program_that_is_forgotten():
    memory, copy = exposing_memory(), Copied()
    memory.give_exposed(b"plan" + bytes(16), copy)
    assert copy.closed


def test_a_daemon_that_listens_hears_what_is_coming(tmp_path):
    endpoint = f"ipc://{tmp_path}/daemon.sock"
    own = RankMemory()
    own.announce(endpoint, "policy")  # nobody listens: nothing is left to be sent, and nothing raised
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.LINGER, 0)
        router.bind(endpoint)
        own.announce(endpoint, "policy")
        assert router.poll(20_000)
        assert decode_untrusted(router.recv_multipart()[-1]) == Heartbeat(coming="policy")
        assert not router.poll(0)
    own.close_links()
