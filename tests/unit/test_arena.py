from __future__ import annotations

import contextlib
import gc
import os
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest

from weightsync.errors import CodecError, ConfigError, LocalProtocolError, TransportBroken, TransportClosed
from weightsync.ipc.arena import Arena, ArenaOffer
from weightsync.ipc.descriptors import seal
from weightsync.ipc.segments import remove_stale, segment_name

HEX = "0123456789abcdef"


@pytest.fixture
def made(tmp_path):
    with Arena.create(node="n", bridge=3, slots=2, slot_bytes=5000, directory=str(tmp_path)) as arena:
        yield arena


def _altered(arena: Arena, **changes: object) -> bytes:
    """A well-sealed offer that says something else than the arena's own."""
    return seal(b"A", msgspec.structs.replace(ArenaOffer.unpack(arena.offer("r/0", 0)), **changes))


def _mapped(name: str) -> bool:
    return name in Path("/proc/self/maps").read_text()


def _open(name: str) -> list[str]:
    """Descriptors of this process for it; others open and close files of theirs meanwhile."""
    found = []
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(os.readlink(fd))
    return [link for link in found if name in link]


def test_a_trainer_writes_what_a_reader_reads(made):
    with Arena.attach(made.offer(), writable=True) as trainer, Arena.attach(made.offer("r/0", 0), writable=False) as r:
        trainer.slot(1)[:] = bytes(range(250)) * 20
        assert bytes(r.slot(1)) == bytes(made.slot(1)) == bytes(range(250)) * 20
        assert bytes(r.slot(0)) == bytes(5000)
        r.fences.export(1, 0, 9)
        assert made.fences.read(1, 0) == r.fences.read(1, 0)


def test_another_process_attaches(made):
    code = (
        "import sys; from weightsync.ipc.arena import Arena\n"
        "a = Arena.attach(bytes.fromhex(sys.argv[1]), writable=True); a.slot(0)[:5] = b'hello'; a.close()"
    )
    subprocess.run(
        [sys.executable, "-c", code, made.offer().hex()], check=True, env=os.environ | {"PYTHONPATH": os.getcwd()}
    )
    assert bytes(made.slot(0)[:5]) == b"hello"


def test_the_file_is_private_named_and_allocated(made, tmp_path):
    (path,) = tmp_path.iterdir()
    status = path.stat()
    assert path.name == made.name
    assert path.name.startswith(f"weightsync-{os.geteuid()}-n-3-")
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_blocks * 512 >= status.st_size > 2 * 5000, "a sparse file is a SIGBUS to come"


def test_slots_are_page_aligned(made):
    for slot in range(2):
        assert np.frombuffer(made.slot(slot), np.uint8).ctypes.data % 4096 == 0


def test_readers_cannot_write_slots(made):
    with Arena.attach(made.offer("r/0", 0), writable=False) as reader:
        assert reader.slot(0).readonly
        with pytest.raises(TypeError):
            reader.slot(0)[0] = 1


def test_close_while_views_are_held(made):
    arena = Arena.attach(made.offer(), writable=True)
    view = np.frombuffer(arena.slot(0), np.uint8)
    view[:] = 7
    arena.close()
    arena.close()
    assert view.sum() == 7 * 5000, "memory went away under a view"
    with pytest.raises(TransportClosed):
        arena.slot(0)
    with pytest.raises(TransportClosed):
        _ = arena.fences


def test_memory_is_unmapped_with_the_last_view(tmp_path):
    arena = Arena.create(node="n", bridge=0, slots=1, slot_bytes=5000, directory=str(tmp_path))
    assert _open(arena.name)
    view = arena.slot(0)[10:20]
    arena.close()
    arena.unlink()
    arena.unlink()
    assert _mapped(arena.name)
    del view
    gc.collect()
    assert not _mapped(arena.name)
    assert not _open(arena.name)


def test_there_is_no_slot_outside(made):
    for index in (-1, 2):
        with pytest.raises(LocalProtocolError):
            made.slot(index)


def test_an_arena_that_is_gone(made):
    made.unlink()
    with pytest.raises(TransportBroken, match="No such file") as caught:
        Arena.attach(made.offer(), writable=True)
    assert "--ipc=host" in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../../etc/passwd"},
        {"name": f"weightsync-0-a/b-0-{HEX}"},
        {"name": f"weightsync-0-n-0-{HEX}\n"},
        {"name": f"weightsync-0-n-0-{HEX}/../x"},
        {"name": f"other-0-n-0-{HEX}"},
        {"directory": "dev/shm"},
        {"directory": "/dev/shm/../../etc"},
        {"directory": "/dev/\0shm"},
        {"nonce": b"short"},
        {"slots": 0},
        {"slots": 2**40},
        {"slot_bytes": 0},
        {"slot_bytes": 2**60},
        {"readers": 10**9},
        {"reader": ""},
        {"reader": None},
        {"cell": None},
        {"cell": 512},
        {"cell": -1},
    ],
)
def test_offers_that_are_none(made, changes):
    with pytest.raises(CodecError):
        Arena.attach(_altered(made, **changes), writable=False)


@pytest.mark.parametrize("changes", [{"slots": 1}, {"slots": 3}, {"slot_bytes": 4999}, {"readers": 511}])
def test_an_offer_must_fit_the_file(made, changes):
    with pytest.raises(TransportBroken):
        Arena.attach(_altered(made, **changes), writable=False)


def test_another_incarnation_under_the_same_name(made):
    with pytest.raises(TransportBroken, match="not the one that was offered"):
        Arena.attach(_altered(made, nonce=bytes(16)), writable=False)


@pytest.mark.parametrize("kind", ["symlink", "fifo", "directory", "readable", "short"])
def test_what_lies_there_must_be_an_arena_of_ours(made, tmp_path, kind):
    path = tmp_path / made.name
    if kind == "readable":
        path.chmod(0o644)
    elif kind == "short":
        os.truncate(path, 4096)
    else:
        path.rename(tmp_path / "moved")
        if kind == "symlink":
            path.symlink_to(tmp_path / "moved")
        elif kind == "fifo":
            os.mkfifo(path, 0o600)
        else:
            path.mkdir()
    with pytest.raises(TransportBroken):
        Arena.attach(made.offer(), writable=True)
    if kind == "directory":
        path.rmdir()


def test_a_file_of_another_user_is_refused(made, monkeypatch):
    offer = made.offer()
    monkeypatch.setattr("weightsync.ipc.arena.os.geteuid", lambda: 4242)
    with pytest.raises(TransportBroken, match="private"):
        Arena.attach(offer, writable=True)


def test_a_full_file_system_says_what_is_needed():
    space = os.statvfs("/dev/shm")
    slot_bytes = space.f_blocks * space.f_frsize  # all there can ever be, and the table comes on top
    before = set(os.listdir("/dev/shm"))
    with pytest.raises(ConfigError) as caught:
        Arena.create(node="toolarge", bridge=0, slots=2, slot_bytes=slot_bytes)
    text = str(caught.value)
    needed = int(text.split(" needs ")[1].split()[0])
    assert needed > 2 * slot_bytes
    assert " free " in text
    for word in ("arena.slots", "arena.slot_bytes", "--shm-size", "/dev/shm"):
        assert word in text
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "toolarge" in name}


def test_an_arena_is_never_made_over_a_file(tmp_path):
    make = partial(Arena.create, node="n", bridge=0, slots=1, slot_bytes=10, directory=str(tmp_path), incarnation=HEX)
    path = tmp_path / segment_name("n", 0, HEX)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="exists"):
        make()
    assert not (tmp_path / "elsewhere").exists()
    path.unlink()
    with make(), pytest.raises(ConfigError, match="exists"):
        make()


@pytest.mark.parametrize(
    "changes", [{"node": "a/b"}, {"node": ""}, {"incarnation": "xyz"}, {"slots": 0}, {"readers": 0}]
)
def test_arenas_that_cannot_be(tmp_path, changes):
    make = partial(Arena.create, node="n", bridge=0, slots=1, slot_bytes=10, directory=str(tmp_path))
    with pytest.raises(ConfigError):
        make(**changes)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="No such"):
        Arena.create(node="n", bridge=0, slots=1, slot_bytes=10, directory=str(tmp_path / "no"))


def test_stale_arenas_are_removed_by_node_and_bridge(tmp_path):
    names = {
        key: segment_name(node, bridge, incarnation)
        for key, (node, bridge, incarnation) in {
            "mine": ("a", 0, HEX),
            "kept": ("a", 0, HEX[::-1]),
            "other bridge": ("a", 1, HEX),
            "longer name": ("a-0", 0, HEX),
            "prefixed name": ("x-a", 0, HEX),
        }.items()
    }
    for name in names.values():
        (tmp_path / name).touch()
    (tmp_path / "weightsync-notes.txt").touch()
    target = tmp_path / segment_name("a", 7, HEX)
    target.symlink_to(tmp_path / "weightsync-notes.txt")
    assert remove_stale(str(tmp_path), "a", bridge=0, keep=frozenset({HEX[::-1]})) == (names["mine"],)
    assert remove_stale(str(tmp_path), "a", keep=frozenset({HEX[::-1]})) == (names["other bridge"],)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {
        names["kept"],
        names["longer name"],
        names["prefixed name"],
        "weightsync-notes.txt",
        target.name,
    }
    assert remove_stale(str(tmp_path / "no"), "a") == ()
