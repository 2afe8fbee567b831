"""Memory of another process, mapped for as long as that is there."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from weightsync.drawing.drawer import Drawer
from weightsync.errors import TransportBroken
from weightsync.ipc import gone
from weightsync.ipc.regions import RegionMap
from weightsync.plan.draws import Wanted, Wants
from weightsync.plan.exposure import Exposure, Exposures, Part, Region
from weightsync.plan.manifest import Manifest
from weightsync.plan.table import TensorTable
from weightsync.processes import started
from weightsync.testing import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "weightsync-0123456789abcdef"
_HOLDER = """
import fcntl, os, sys
fd = os.memfd_create(sys.argv[1], os.MFD_ALLOW_SEALING)
os.write(fd, bytes(range(64)))
fcntl.fcntl(fd, fcntl.F_ADD_SEALS, int(sys.argv[2]))
print(fd, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder():
    """A process that holds 64 bytes: itself, and the descriptor."""
    with _holder(fcntl.F_SEAL_SHRINK) as held:
        yield held


@contextlib.contextmanager
def _holder(seals: int) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-c", _HOLDER, NAME, str(seals)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
        process.kill()


def exposure(pid: int, fd: int, *, name: str = NAME, nbytes: int = 64, since: str | None = None) -> Exposure:
    part = Part(0, (0,), (16,), 0, 0, (4,))
    return Exposure.of(
        pid, started(pid) if since is None else since, [Region(nbytes=nbytes, fd=fd, name=name)], [part], 1
    )


def one_tensor() -> Manifest:
    table = TensorTable(names=("w",), dtypes=("float32",), shapes=((16,),), aliases=())
    none = np.zeros(0, dtype=np.int64)
    owners = none.astype(np.int32)
    return Manifest(table, owners, none, none, none, np.zeros(1, dtype=np.int64), none, owners, 1)


def mapped() -> int:
    with open("/proc/self/maps") as maps:
        return sum(NAME in line for line in maps)


def test_what_is_mapped_stays_so_until_other_memory_is_asked_for(holder):
    process, fd = holder
    one = exposure(process.pid, fd)
    regions_ = RegionMap(None)
    with regions_.mapped([one]) as ((address,),):
        pass
    assert mapped() == 1
    with regions_.mapped([one]) as ((again,),):
        assert again == address
    with regions_.mapped([]) as none:
        assert none == []
    assert mapped() == 0
    with regions_.mapped([one]):
        pass
    regions_.release()
    assert mapped() == 0


def test_many_regions_cost_no_more_than_their_process(holder, monkeypatch):
    """Of small tensors a trainer has tens of thousands, and whoever looks after them holds up who reads."""
    process, fd = holder
    regions = [Region(nbytes=nbytes, fd=fd, name=NAME) for nbytes in range(1, 65)]
    ranks = [Exposure.of(process.pid, started(process.pid), regions, [], 1)]
    regions_ = RegionMap(None)
    with regions_.mapped(ranks) as first:
        assert mapped() == 64
    asked: list[int] = []

    def asking(pid: int) -> str:
        asked.append(pid)
        return started(pid)

    monkeypatch.setattr("weightsync.ipc.regions.started", asking)
    monkeypatch.delattr(RegionMap, "_map")
    with regions_.mapped(ranks) as again:
        assert again is first
    assert regions_._look()
    assert len(asked) == 2
    regions_.release()
    assert mapped() == 0


def test_memory_of_a_process_that_has_ended_is_let_go(holder, monkeypatch):
    monkeypatch.setattr(gone, "_EVERY", 0.01)
    process, fd = holder
    regions_ = RegionMap(None)
    with regions_.mapped([exposure(process.pid, fd)]):
        process.kill()
        process.wait(10)
        assert not regions_._look() or mapped() == 1, "not while it is read"
    assert eventually(lambda: mapped() == 0)


def test_a_look_that_fails_is_not_the_last(monkeypatch):
    """The thread ends with an error in the log; whoever maps something next starts another."""
    monkeypatch.setattr(gone, "_EVERY", 0.01)
    looks: list[int] = []

    def look() -> bool:
        looks.append(len(looks))
        if len(looks) == 1:
            raise RuntimeError("cannot be unmapped")
        return False

    lookout = gone.Lookout(look, None)
    lookout.start()
    assert eventually(lambda: not lookout._running)
    assert len(looks) == 1
    lookout.start()
    assert eventually(lambda: not lookout._running)
    assert len(looks) == 2


@pytest.mark.parametrize("what", ["fd", "name", "size", "since", "pid"])
def test_what_is_not_what_was_exposed_is_not_mapped(holder, what):
    process, fd = holder
    terms = {"pid": process.pid, "fd": fd}
    wrong: dict[str, dict[str, Any]] = {
        "fd": {"fd": 0},
        "name": {"name": "weightsync-else"},
        "size": {"nbytes": 65},
        "since": {"since": "1"},
        "pid": {"pid": 2**22 - 1, "since": "7"},
    }
    with pytest.raises(TransportBroken), RegionMap(None).mapped([exposure(**(terms | wrong[what]))]):
        pass
    assert mapped() == 0


def test_memory_that_may_shrink_under_a_reader_is_not_mapped():
    with _holder(0) as (process, fd), pytest.raises(TransportBroken, match="may change it"):
        RegionMap(None).mapped([exposure(process.pid, fd)]).__enter__()


def test_places_are_mapped_for_writing():
    with _holder(fcntl.F_SEAL_SHRINK) as (process, fd):
        one, (places, weights) = exposure(process.pid, fd), (RegionMap(None, writable=True), RegionMap(None))
        with places.mapped([one]) as ((address,),), weights.mapped([one]) as ((read,),):
            ctypes.memset(int(address) + 4, 0xEE, 2)
            assert ctypes.string_at(int(read), 8) == bytes([0, 1, 2, 3, 0xEE, 0xEE, 6, 7])
        places.release()
        weights.release()
    with pytest.raises(TransportBroken, match=r"an engine's worker that showed its memory \(process"):
        places.mapped([one]).__enter__()


def test_places_that_may_not_be_written_are_not_mapped():
    with _holder(fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE) as (process, fd):
        places, one = RegionMap(None, writable=True), exposure(process.pid, fd)
        with pytest.raises(TransportBroken, match=r"what an engine's worker showed \(process \d+\) cannot be mapped"):
            places.mapped([one]).__enter__()


def test_what_was_refused_once_is_not_tried_again(holder, monkeypatch):
    process, fd = holder
    manifest = one_tensor()
    exposures = Exposures.of([exposure(process.pid, fd, name="weightsync-else").packed])
    drawer = Drawer(None)
    wants = Wants([Wanted(0, (0,), (16,), 4, 0, 0, (4,))], [0])
    why = drawer.draw(exposures, wants, manifest, deadline=0)
    assert "is not the memory that process" in why
    monkeypatch.delattr("weightsync.drawing.drawer.Exposure")
    assert drawer.draw(exposures, wants, manifest, deadline=0) == why


def test_what_is_not_exposed_is_named(holder):
    process, _fd = holder
    drawer = Drawer(None)
    wants = Wants([Wanted(0, (0,), (16,), 4, 0, 0, (4,))], [0])
    nothing = Exposure.of(process.pid, started(process.pid), [], [], 1)
    why = drawer.draw(Exposures.of([nothing.packed]), wants, one_tensor(), deadline=0)
    assert "16 elements of 'w' are exposed by no rank" in why
    assert "packed exposure" in drawer.draw(Exposures.of([b"junk"]), wants, one_tensor(), deadline=0)


def test_a_file_of_the_disk_is_not_mapped(tmp_path):
    """However it calls itself: only memory that nobody else can open by a name."""
    path = tmp_path / f"memfd:{NAME} (deleted)"
    path.write_bytes(bytes(64))
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(TransportBroken), RegionMap(None).mapped([exposure(os.getpid(), fd)]):
            pass
    finally:
        os.close(fd)


def test_a_drawer_works_a_layout_out_once(holder, monkeypatch):
    process, fd = holder
    manifest = one_tensor()
    exposures = Exposures.of([exposure(process.pid, fd).packed])
    target = np.zeros(12, dtype="<f4")
    boxes = (Wanted(0, (4,), (12,), 4, 0, 0, (4,)),)
    drawer = Drawer(None)
    drawer.draw(exposures, Wants(boxes, [target.ctypes.data]), manifest, deadline=0)
    assert target.tobytes() == bytes(range(16, 64))
    monkeypatch.delattr("weightsync.drawing.drawer.draws")
    moved = np.zeros(12, dtype="<f4")
    drawer.draw(Exposures.of(exposures.ranks), Wants(boxes, [moved.ctypes.data]), manifest, deadline=0)
    assert moved.tobytes() == bytes(range(16, 64))
    with pytest.raises(NameError):
        drawer.draw(exposures, Wants(list(boxes), [0]), manifest, deadline=0)
    drawer.release()
    assert mapped() == 0


def test_gpu_memory_and_host_memory_are_not_taken_for_one_another():
    gpu = Region(nbytes=64, gpu="GPU", handle=bytes(64), serial=1)
    here = Exposure.of(os.getpid(), started(os.getpid()), [gpu], [], 1)
    with pytest.raises(TransportBroken, match="without a GPU"), RegionMap(None).mapped([here]):
        pass
