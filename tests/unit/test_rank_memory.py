"""What a trainer's process keeps mapped between pushes, and when it lets go."""

from __future__ import annotations

import multiprocessing
import threading

import pytest

from weightsync.ipc import gone
from weightsync.ipc.arena import Arena, DeviceMemory
from weightsync.ipc.cuda import DeviceSlots
from weightsync.rank_memory import RankMemory, memory
from weightsync.testing import eventually


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
