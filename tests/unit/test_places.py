"""A worker shows where it has places for what is pushed, and others write there."""

from __future__ import annotations

import os
from contextlib import closing, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.hand_push import HandPush, Tensors, as_bytes, soon
from tests.places_kit import write, write_elsewhere
from weightsync.adapters.worker import SlotReader
from weightsync.drawing import landing
from weightsync.drawing.places import Places
from weightsync.errors import LocalProtocolError, TransportBroken
from weightsync.ipc import allocations
from weightsync.ipc.memfile import MemoryFile
from weightsync.plan.draws import Wanted, Wants
from weightsync.plan.exposure import Exposure, Region
from weightsync.plan.packing import DIGEST_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightsync.ipc.allocations import Allocation
    from weightsync.plan.manifest import Manifest

NAMES = ("rows", "columns", "half", "scale", "norm")


def pushed(seed: int) -> Tensors:
    some = torch.Generator().manual_seed(seed)
    return as_bytes(
        {
            "rows": torch.randn(6, 8, generator=some),
            "columns": torch.randn(5, 4, generator=some),
            "half": torch.randn(7, generator=some).to(torch.bfloat16),
            "scale": torch.randn((), generator=some),
            "norm": torch.randint(-100, 100, (3,), generator=some, dtype=torch.int8),
        }.items()
    )


class Model:
    """Parameters in host memory: fused, transposed, a scalar, and half of a tensor whose rest another rank has."""

    def __init__(self) -> None:
        self.arrays = [np.zeros((6, 8), "<f4"), np.zeros(40, "u1"), np.zeros((4, 5), "<f4")]
        index = {name: at for at, name in enumerate(sorted(NAMES))}
        self.boxes = (
            Wanted(index["rows"], (3, 2), (3, 6), 4, 0, 8, (32, 4)),  # into its first rows, from the third column on
            Wanted(index["columns"], (0, 0), (5, 4), 4, 2, 0, (4, 20)),
            Wanted(index["half"], (0,), (7,), 2, 1, 2, (4,)),
            Wanted(index["scale"], (), (), 4, 1, 32, ()),
            Wanted(index["norm"], (1,), (2,), 1, 1, 36, (1,)),
        )

    @property
    def wants(self) -> Wants:
        return Wants(self.boxes, [array.ctypes.data for array in self.arrays])

    def move(self) -> None:
        self.arrays = [array.copy() for array in self.arrays]

    def holds(self, tensors: Tensors) -> bool:
        fused, mixed, turned = self.arrays
        rows, columns = (np.frombuffer(tensors[name][2], "<f4") for name in ("rows", "columns"))
        return (
            np.array_equal(fused[:3, 2:], rows.reshape(6, 8)[3:, 2:])
            and not fused[3:].any()
            and not fused[:, :2].any()
            and np.array_equal(turned.T, columns.reshape(5, 4))
            and np.array_equal(mixed[2:30].view("<u2")[::2], np.frombuffer(tensors["half"][2], "<u2"))
            and not mixed[4:30].view("<u2")[::2].any()
            and mixed[32:36].tobytes() == tensors["scale"][2]
            and mixed[36:38].tobytes() == tensors["norm"][2][1:]
        )


@pytest.fixture
def hand():
    with HandPush(slot_bytes=1024) as made:
        yield made


@pytest.fixture
def slots():
    with closing(SlotReader("cpu")) as made:
        yield made


def begun(slots: SlotReader, hand: HandPush, seed: int) -> tuple[Manifest, Tensors]:
    tensors = {name: pushed(seed)[name] for name in sorted(NAMES)}
    manifest = hand.manifest(tensors)
    assert manifest.tensors.names == tuple(sorted(NAMES))
    slots.begin(manifest, hand.offers("e", 1)[0], deadline=soon())
    return manifest, tensors


def memory_files() -> set[str]:
    links = [os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    return {link for link in links if "memfd:weightsync-" in link}


@pytest.fixture
def files() -> Callable[[], int]:
    """Tells how many landings are open here that were not before."""
    before = memory_files()
    return lambda: len(memory_files() - before)


def test_what_another_process_writes_is_in_the_parameters_at_the_end(slots, hand, files):
    model = Model()
    manifest, tensors = begun(slots, hand, 1)
    told = slots.places(model.wants, ())
    assert told.why_not == ""
    write_elsewhere([told.places], manifest, tensors)
    assert not model.holds(tensors), "nothing before the end"
    assert slots.finish() is True
    assert model.holds(tensors)
    digest = Exposure.unpack(told.places, manifest.tensors).digest

    manifest, tensors = begun(slots, hand, 2)
    assert slots.places(model.wants, [bytes(16), digest]).places == digest
    assert slots.places(model.wants, [bytes(16)]).places == told.places
    model.move()  # a landing is where it was
    assert slots.places(model.wants, [digest]).places == digest
    write([told.places], manifest, tensors)
    slots.finish()
    assert model.holds(tensors)

    manifest, tensors = begun(slots, hand, 3)
    other = Model()
    again = slots.places(other.wants, [digest]).places
    assert len(again) > DIGEST_BYTES
    assert Exposure.unpack(again, manifest.tensors).digest != digest, "other boxes"
    write([again], manifest, tensors)
    slots.finish()
    assert other.holds(tensors)
    assert files() == 1
    slots.close()
    assert files() == 0


def test_buckets_that_come_after_all_are_what_counts(slots, hand, files):
    model = Model()
    manifest, tensors = begun(slots, hand, 1)
    told = slots.places(model.wants, ())
    write([told.places], manifest, tensors)
    for bucket in range(manifest.buckets):
        slots.read(bucket, hand.tickets(manifest, bucket, tensors, "e", 1)[0], deadline=soon())
    assert files() == 0
    assert slots.finish() is False
    assert not any(array.any() for array in model.arrays)
    with pytest.raises(LocalProtocolError, match="begin first"):
        slots.places(model.wants, ())


def test_places_of_an_update_that_was_given_up_are_not_read(slots, hand):
    model = Model()
    manifest, tensors = begun(slots, hand, 1)
    told = slots.places(model.wants, ())
    write([told.places], manifest, tensors)
    begun(slots, hand, 2)
    with pytest.raises(LocalProtocolError, match="did not come whole"):
        slots.finish()
    assert not any(array.any() for array in model.arrays)


def test_no_room_is_a_reason_and_another_time_there_may_be_some(slots, hand, monkeypatch, caplog):
    asked: list[int] = []
    made = MemoryFile

    def full(nbytes: int) -> None:
        asked.append(nbytes)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(landing, "MemoryFile", full)
    model = Model()
    begun(slots, hand, 1)
    for _ in range(2):
        told = slots.places(model.wants, ())
        assert (told.places, "of host memory: No space left" in told.why_not) == (b"", True)
    assert len(asked) == 2
    assert "has no places to show" in caplog.text
    with pytest.raises(LocalProtocolError, match="did not come whole"):
        slots.finish()
    monkeypatch.setattr(landing, "MemoryFile", made)
    begun(slots, hand, 1)
    assert slots.places(model.wants, ()).places


def test_nothing_that_is_wanted_has_no_regions():
    shown = Places(None).show(Wants((), []), 2)
    assert isinstance(shown, Exposure)
    assert (len(shown), shown.regions) == (0, ())


class Gpu:
    """What is asked of CUDA: allocations of 1,024 bytes, each with a serial."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.serials: dict[int, int] = {}
        self.shared: list[int] = []
        self.refuses = False
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="the-gpu"))
        monkeypatch.setattr(allocations, "range_of", lambda at: (at // 1024 * 1024, 1024))
        monkeypatch.setattr(allocations, "serial_of", lambda at: self.serials.setdefault(at, 7))
        monkeypatch.setattr(allocations, "shown", self.show)

    def show(self, allocation: Allocation, gpu: str) -> Region:
        self.shared.append(allocation.address)
        if self.refuses:
            raise TransportBroken("an allocation cannot be shared")
        return Region(nbytes=allocation.nbytes, gpu=gpu, handle=b"h", serial=allocation.serial)


def test_on_a_gpu_the_parameters_themselves_are_shown(monkeypatch):
    gpu, model, shows = Gpu(monkeypatch), Model(), Places(0)
    wants = Wants(model.boxes, [1024 * 5, 1024 * 3, 1024 * 5 + 256])

    def show(wants: Wants) -> Any:
        shown = shows.show(wants, 2)
        assert isinstance(shown, Exposure)
        return shown

    first = show(wants)
    assert [(one.gpu, one.serial) for one in first.regions] == [("the-gpu", 7)] * 2
    assert first.region.tolist() == [1, 1, 0, 0, 0]
    assert first.at.tolist() == [8, 256, 2, 32, 36]
    assert first.strides[1].tolist() == [4, 20]
    assert show(Wants(model.boxes, list(wants.targets))) is first
    assert gpu.shared == [1024 * 3, 1024 * 5]
    moved = show(Wants(model.boxes, [1024 * 5, 1024 * 3, 1024 * 5 + 512]))
    assert moved.digest != first.digest
    assert show(wants).digest == first.digest, "back where it was"
    gpu.serials[1024 * 3] = 8  # freed, and allocated again
    assert show(wants).digest != first.digest


def test_memory_of_a_gpu_that_cannot_be_shared_is_not_tried_again(monkeypatch):
    gpu, model, shows = Gpu(monkeypatch), Model(), Places(0)
    gpu.refuses = True
    wants = Wants(model.boxes, [1024, 1024, 1024])
    assert shows.show(wants, 2) == shows.show(wants, 2) == "an allocation cannot be shared"
    assert gpu.shared == [1024]
    gpu.refuses = False
    assert isinstance(shows.show(Wants(model.boxes, [2048, 2048, 2048]), 2), Exposure)
