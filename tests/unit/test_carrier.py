"""A bridge's part in deliveries, both ends in this process, over memory instead of a wire."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest

from tests.hand_push import manifest_of
from weightsync.errors import (
    LocalProtocolError,
    TransportBroken,
    TransportClosed,
    TransportTimeout,
    WeightSyncError,
)
from weightsync.ipc.arena import Arena
from weightsync.ipc.memfile import MemoryFile
from weightsync.nccl_bridge import carrier as carrier_module
from weightsync.nccl_bridge import commands as c
from weightsync.nccl_bridge.carrier import Carrier
from weightsync.nccl_bridge.replies import NEVER
from weightsync.plan import delivery
from weightsync.plan.boxes import packed_strides
from weightsync.plan.exposure import Exposure, Exposures, Part
from weightsync.processes import started

SLOT = 4096
ROWS, COLUMNS = 96, 32  # of float32: three slots full


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


class Ends:
    """A trainer's memory, an engine's, and a bridge beside each."""

    def __init__(self) -> None:
        values = np.random.default_rng(1).random((ROWS, COLUMNS), dtype=np.float32)
        self.values = values
        self.manifest = manifest_of({"w": ("float32", (ROWS, COLUMNS), values.tobytes())}, slot_bytes=SLOT)
        self.source, self.target = MemoryFile(values.nbytes), MemoryFile(values.nbytes)
        self.source.memory[:] = values.tobytes()
        self.arenas = [Arena.create(node=f"carrier{n}", bridge=0, slots=2, slot_bytes=SLOT) for n in range(2)]
        self.sending, self.taking = (Carrier(arena, None) for arena in self.arenas)
        self._wire: Queue[bytes] = Queue()

    def close(self) -> None:
        for carrier in (self.sending, self.taking):
            carrier.release()
        for file in (self.source, self.target):
            file.close()
        for arena in self.arenas:
            arena.close()
            arena.unlink()

    def exposed(self, file: MemoryFile) -> bytes:
        shape = (ROWS, COLUMNS)
        part = Part(0, (0, 0), shape, 0, 0, packed_strides(shape, 4))
        pid = os.getpid()
        return Exposures.of([Exposure.of(pid, started(pid), [file.region], [part], 2).packed]).pack()

    def prepare(self, token: int, *, sending: bool, **terms: Any) -> c.Prepare:
        own: dict[str, Any] = {"parcel": 1024, "turn": 0, "turns": 1, "manifest": self.manifest.pack()}
        own |= {"whole": False, "places": self.exposed(self.target)}
        own["exposures"] = self.exposed(self.source) if sending else None
        return c.Prepare(token=token, **{**own, **terms})

    def carry(self, token: int) -> None:
        """Both ends at once; raises what the taking one does."""
        with ThreadPoolExecutor(1) as pool:
            sent = pool.submit(self.sending.run, self, token, [0], packing=True, deadline=soon())  # type: ignore[arg-type]
            taking: Any = _Taking(self)
            self.taking.run(taking, token, [1], packing=False, deadline=soon())
            sent.result(20)

    def broadcast(self, memory: memoryview, root: int, *, deadline: float) -> None:
        self._wire.put(bytes(memory))


class _Taking:
    def __init__(self, ends: Ends) -> None:
        self._ends = ends

    def broadcast(self, memory: memoryview, root: int, *, deadline: float) -> None:
        memory[:] = self._ends._wire.get(timeout=20)


@pytest.fixture
def ends():
    made = Ends()
    yield made
    made.close()


def mapped(ends: Ends) -> int:
    """How often the memory of these ends is mapped here."""
    maps = Path("/proc/self/maps").read_text()
    return sum(maps.count(f"/memfd:{file.region.name}") for file in (ends.source, ends.target))


def test_what_was_prepared_is_carried_again_and_again(ends):
    for token in (7, 8):
        ends.target.memory[:] = bytes(ends.values.nbytes)
        ends.sending.prepare(ends.prepare(token, sending=True), deadline=soon())
        ends.taking.prepare(ends.prepare(token, sending=False), deadline=soon())
        ends.carry(token)
        assert bytes(ends.target.memory) == ends.values.tobytes()


def test_shares_of_the_model_go_wherever_there_is_room(ends):
    for turn in range(2):
        terms = {"whole": True, "turn": turn, "turns": 2}
        ends.sending.prepare(ends.prepare(turn, sending=True, places=None, **terms), deadline=soon())
        ends.taking.prepare(ends.prepare(turn, sending=False, **terms), deadline=soon())
        ends.carry(turn)
    assert bytes(ends.target.memory) == ends.values.tobytes()


def test_what_was_worked_out_serves_every_delivery_of_a_layout(ends, monkeypatch):
    ends.sending.prepare(ends.prepare(1, sending=True), deadline=soon())
    monkeypatch.delattr(carrier_module, "parcels_of")
    ends.sending.prepare(ends.prepare(2, sending=True), deadline=soon())


def test_ends_that_do_not_mean_the_same_pieces_find_it_out(ends):
    ends.sending.prepare(ends.prepare(1, sending=True), deadline=soon())
    ends.taking.prepare(ends.prepare(1, sending=False, parcel=2048), deadline=soon())
    with pytest.raises(TransportBroken, match="takes this one for something else"):
        ends.carry(1)
    assert not any(bytes(ends.target.memory)), "nothing was written"


@pytest.mark.parametrize("terms", [{"parcel": SLOT + 64}, {"turn": 2, "turns": 2}])
def test_terms_that_make_no_sense_are_refused(ends, terms):
    with pytest.raises(LocalProtocolError, match="turns count from 0"):
        ends.taking.prepare(ends.prepare(1, sending=False, **terms), deadline=soon())


@pytest.mark.parametrize("before", [None, 2])
def test_what_was_not_prepared_is_not_carried(ends, before):
    if before is not None:
        ends.taking.prepare(ends.prepare(before, sending=False), deadline=soon())
    with pytest.raises(LocalProtocolError, match="not prepared"):
        ends.taking.run(None, 1, [0], packing=False, deadline=soon())


def test_working_out_ends_at_the_deadline(ends):
    with pytest.raises(TransportTimeout, match="preparing a delivery"):
        ends.sending.prepare(ends.prepare(1, sending=True), deadline=time.monotonic())


def test_working_out_ends_when_another_delivery_is_asked_for(ends, monkeypatch):
    begun = threading.Event()
    parcels_of = delivery.parcels_of

    def slow(boxes: Any, tensors: Any, most: int, *, check: Any) -> Any:
        if begun.is_set():
            return parcels_of(boxes, tensors, most, check)
        begun.set()
        while True:
            check()

    monkeypatch.setattr(carrier_module, "parcels_of", slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ends.sending.prepare, ends.prepare(1, sending=True), deadline=soon())
        assert begun.wait(20)
        ends.sending.prepare(ends.prepare(2, sending=True), deadline=soon())
        with pytest.raises(TransportClosed, match="another delivery"):
            first.result(20)
    ends.taking.prepare(ends.prepare(2, sending=False), deadline=soon())
    ends.carry(2)


def test_what_is_prepared_when_buckets_come_maps_nothing(ends, monkeypatch):
    before = mapped(ends)
    parcels_of = delivery.parcels_of

    def late(boxes: Any, tensors: Any, most: int, *, check: Any) -> Any:
        ends.sending.release()
        return parcels_of(boxes, tensors, most, check)

    monkeypatch.setattr(carrier_module, "parcels_of", late)
    with pytest.raises(TransportClosed, match="nobody waits"):
        ends.sending.prepare(ends.prepare(1, sending=True), deadline=soon())
    assert mapped(ends) == before
    monkeypatch.delattr(carrier_module, "parcels_of")
    ends.sending.prepare(ends.prepare(2, sending=True), deadline=soon())  # what was worked out is there


@pytest.mark.parametrize("how", ["mapped", "exposed"])
def test_what_cannot_be_delivered_as_things_are_says_so(ends, how):
    terms: dict[str, Any] = {}
    if how == "mapped":
        ends.source.close()
    else:
        part = Part(0, (0, 0), (1, COLUMNS), 0, 0, (4 * COLUMNS, 4))
        one = Exposure.of(os.getpid(), started(os.getpid()), [ends.source.region], [part], 2)
        terms["exposures"] = Exposures.of([one.packed]).pack()
    with pytest.raises(WeightSyncError, match=f"cannot be {how}|is not the memory|are {how} by no rank") as raised:
        ends.sending.prepare(ends.prepare(1, sending=True, **terms), deadline=soon())
    assert raised.value.phase == NEVER


def test_what_is_mapped_is_let_go(ends):
    before = mapped(ends)
    ends.sending.prepare(ends.prepare(1, sending=True), deadline=soon())
    ends.taking.prepare(ends.prepare(1, sending=False), deadline=soon())
    ends.carry(1)
    assert mapped(ends) == before + 2, "for the next push"
    ends.sending.release()
    ends.taking.release()
    assert mapped(ends) == before
