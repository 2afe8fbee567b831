"""Shared memory that is too small or becomes full: one clear error, nothing left, and good again once there is room."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.faults.kit import ARENA, TIMEOUTS, segments, until
from tests.own import named
from weightsync import push_weights
from weightsync.errors import PushError, PushRefused
from weightsync.operator import fetch_status

pytestmark = pytest.mark.faults

ROOM = 1 << 20  # bytes of the file system that some of these tests mount
NEEDED = 64 * 1024 + 64 * 1024 + 2 * 64 * 1024  # header, fences, two slots: the arena of `ARENA`


@pytest.fixture
def small(tmp_path):
    """A tmpfs of `ROOM` bytes."""
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(tmp_path)], capture_output=True, check=False
        )
    except OSError as error:
        pytest.skip(f"no mount here: {error}")
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.decode().strip()}")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.fixture
def start(node):
    """Starts daemons beside that of the node, with its engines, and ends them."""
    started = []

    def start(stem, **sections):
        sections = {"timeouts": TIMEOUTS, "arena": ARENA, **sections}
        started.append(node.fleet.start_daemon(named(stem), node.engines, **sections))
        return started[-1]

    yield start
    for daemon in started:
        daemon.kill(signal.SIGCONT)
        node.fleet.end(daemon)
        node.fleet.children.remove(daemon)
        assert "Traceback" not in daemon.log.read_text()
        assert not segments(daemon.name)


def attempt(fleet, stem, **sections):
    """Start a daemon that cannot start; returns the lines that it says."""
    name = named(stem)
    config = fleet.root / f"{name}.toml"
    tables = {"node": {}, **sections}
    tables["node"] = {"name": name, "listen": f"ipc://{fleet.root / name}.sock", **tables["node"]}
    text = ""
    for table, keys in tables.items():
        text += f"[{table}]\n" + "".join(f"{k} = {repr(v) if isinstance(v, str) else v}\n" for k, v in keys.items())
    config.write_text(text)
    daemon = fleet.spawn(name, ["-m", "weightsyncd", "--node-config", str(config)])
    assert daemon.wait(20) == 2, daemon.tail()
    fleet.children.remove(daemon)
    said = daemon.log.read_text()
    assert "Traceback" not in said
    assert not (fleet.root / f"{name}.sock").exists()
    bridges = [p for p in psutil.process_iter(["cmdline"]) if name in (p.info["cmdline"] or [])]
    assert not bridges, "a bridge was left"
    return said.splitlines()


def free(directory):
    space = os.statvfs(directory)
    return space.f_bavail * space.f_frsize


def test_an_arena_that_does_not_fit_is_one_clear_error(node, small):
    """Two slots of 512 KiB and their header and fences in 1 MiB."""
    arena = {**ARENA, "slot_bytes": "512KiB"}
    said = attempt(node.fleet, "tight", node={"shm_dir": str(small)}, arena=arena)
    needed = 2 * 64 * 1024 + ROOM
    about = f"an arena of 2 slots of 524288 bytes needs {needed} bytes in {small}, which has {ROOM} free"
    assert [line for line in said if "weightsyncd: " in line] == [f"weightsyncd: {about} (No space left on device)"]
    assert sum("needs" in line for line in said) == 1
    hint = f"make arena.slots or arena.slot_bytes smaller, or {small} larger (containers: --shm-size=2m or more)"
    assert said[-1] == f"  hint: {hint}"
    assert free(small) == ROOM
    assert not list(small.iterdir())


def test_an_arena_larger_than_any_memory_is_the_same_error(node):
    said = attempt(node.fleet, "vast", arena={**ARENA, "slots": 512, "slot_bytes": "64GiB"})
    (line,) = [line for line in said if "weightsyncd: " in line]
    found = re.search(r"needs (\d+) bytes in /dev/shm, which has (\d+) free", line)
    assert found is not None
    assert int(found[1]) > 512 * 2**36 > int(found[2]) > 0
    assert "arena.slots or arena.slot_bytes" in said[-1]
    assert not segments(named("vast"))


def stopped(pid):
    """Whether all of a process's threads stand still: its first is not the one that hears of a child's end."""
    states = [task.read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").glob("*/stat")]
    return set(states) == {"T"}


class Filled:
    """A small file system that becomes full while no bridge has an arena in it."""

    name = "full"

    def __init__(self, small):
        self._small = small
        self._rest = small / "rest"

    def close(self, daemon, bridge):
        daemon.kill(signal.SIGSTOP)  # it must not start the next bridge before there is no room
        until(lambda: stopped(daemon.pid), "the daemon has stopped")
        bridge.kill()
        until(lambda: bridge.status() == psutil.STATUS_ZOMBIE, "the bridge has ended")
        (arena,) = self._small.glob("weightsync-*")
        os.truncate(arena, 0)
        with self._rest.open("wb") as rest:
            os.posix_fallocate(rest.fileno(), 0, free(self._small))
        daemon.kill(signal.SIGCONT)
        return "No space left on device"

    def open(self, daemon):
        self._rest.unlink()


class Limited:
    """Files of the daemon and its children may not become as large as an arena; this needs no permission to mount."""

    name = "limited"

    def close(self, daemon, bridge):
        _, most = resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (NEEDED // 2, most))
        bridge.kill()
        return "File too large"

    def open(self, daemon):
        _, most = resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (most, most))


@pytest.fixture(params=["full", "limited"])
def room(request):
    """Where the arena is, and what takes the room away and gives it back."""
    if request.param == "limited":
        return Path("/dev/shm"), Limited()
    small = request.getfixturevalue("small")
    return small, Filled(small)


def says(daemon, words):
    """Whether these words (an expression) are in what status says of the bridge."""
    return re.search(words, fetch_status(daemon.endpoint).bridges[0].error or "") is not None


def test_a_bridge_that_restarts_without_room_says_so_until_there_is_some(node, room, start):
    directory, door = room
    daemon = start(door.name, node={"shm_dir": str(directory)})

    def push(version):
        return push_weights(node.weights("C"), version=version, daemon=daemon.endpoint, timeout=15)

    assert push(node.next_version()).complete
    (bridge,) = fetch_status(daemon.endpoint).bridges
    why = door.close(daemon, psutil.Process(bridge.pid))
    needs = rf"needs {NEEDED} bytes in {directory}, which has \d+ free \({why}\)"
    until(lambda: says(daemon, needs), "status shows the reason")
    assert fetch_status(daemon.endpoint).bridges[0].pid is None

    with pytest.raises(PushError) as caught:
        push(node.next_version())
    assert re.search(needs, caught.value.message)
    assert "arena.slots or arena.slot_bytes" in (caught.value.hint or "")
    for engine in node.engines:
        assert not node.info(engine)["torn"]
        node.serves(engine, "C")

    door.open(daemon)
    until(lambda: fetch_status(daemon.endpoint).bridges[0].pid is not None, "the bridge is back")
    (bridge,) = fetch_status(daemon.endpoint).bridges
    assert re.search(needs, bridge.error or "")  # still says why it was away
    report = push(node.next_version())
    node.holds("C", report)


def test_a_fused_group_larger_than_a_slot_is_refused_with_the_size_to_set(node, start):
    daemon = start("narrow", arena={"slots": 2, "slot_bytes": "16KiB"})
    with pytest.raises(PushRefused) as caught:
        push_weights(node.weights("C"), version=node.next_version(), daemon=daemon.endpoint)
    error = caught.value
    group = r"model\.layers\.0\.self_attn\.k_proj\.weight, .*q_proj\.weight, .*v_proj\.weight"
    words = rf"engines fuse {group}: they must travel in one bucket and need (\d+) bytes; a slot has 16384"
    found = re.fullmatch(words, error.message)
    assert found is not None, error.message
    hint = re.fullmatch(r"raise arena.slot_bytes to at least (\d+)", error.hint or "")
    assert hint is not None
    assert int(hint[1]) >= int(found[1]) == 32768
    assert node.torn_or_whole(node.before) == set()
    # and as much is enough
    size = -(-int(hint[1]) // 256) * 256
    wider = start("wide", arena={"slots": 2, "slot_bytes": size})
    report = push_weights(node.weights("C"), version=node.next_version(), daemon=wider.endpoint)
    node.holds("C", report)
