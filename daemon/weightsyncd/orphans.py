"""Bridges that outlived their daemon: found by their command line, ended, their arenas removed.

A bridge ends by itself when its daemon does; one that was stopped (SIGSTOP) or hangs in the kernel cannot. It is
recognised by its command line, which names the node and, by pid and start time, the daemon that started it.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from weightsync.ipc.segments import DIRECTORY, remove_stale
from weightsync.processes import started

__all__ = ["kill_orphans"]

logger = logging.getLogger(__name__)


class _Found(NamedTuple):
    pid: int
    incarnation: str
    orphan: bool


def kill_orphans(node: str, directory: str = DIRECTORY, *, timeout: float = 5.0) -> int:
    """End bridges of `node` that a dead daemon left behind, and remove the arenas that no living bridge owns.

    For the start of a daemon. Blocks until they have ended, at most `timeout` seconds. Returns how many it ended.
    """
    ended = 0
    keep = set()
    deadline = time.monotonic() + timeout
    for found in _bridges(node, directory):
        if not found.orphan:
            keep.add(found.incarnation)
        elif _kill(found.pid, node, directory, deadline):
            ended += 1
    for name in remove_stale(directory, node, keep=frozenset(keep)):
        logger.warning("[node=%s] removed the arena %s of a dead daemon", node, name)
    return ended


def _bridges(node: str, directory: str) -> list[_Found]:
    """Bridges of `node` in `directory` that belong to this user."""
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    return [bridge for pid in pids if (bridge := _bridge(pid, node, directory)) is not None]


def _bridge(pid: int, node: str, directory: str) -> _Found | None:
    with suppress(OSError):
        process = Path(f"/proc/{pid}")
        if process.stat().st_uid != os.geteuid():
            return None
        words = (process / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
        options = dict(pairwise(words))
        if options.get("-m") != "weightsync.nccl_bridge" or options.get("--node") != node:
            return None
        if options.get("--shm-dir") != directory:
            return None
        daemon, _, start = options.get("--daemon", "").partition(":")
        alive = daemon.isdigit() and start != "" and started(int(daemon)) == start
        return _Found(pid, options.get("--incarnation", ""), not alive)
    return None


def _kill(pid: int, node: str, directory: str, deadline: float) -> bool:
    """End one orphan and wait for it. False if it has ended by itself."""
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        again = _bridge(pid, node, directory)  # with the handle open, the pid cannot come to mean another process
        if again is None or not again.orphan:
            return False
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        waiting = select.poll()
        waiting.register(handle, select.POLLIN)
        gone = waiting.poll(max(0.0, deadline - time.monotonic()) * 1000)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    logger.warning("[node=%s] ended bridge %d of a dead daemon%s", node, pid, "" if gone else ", which hangs on")
    return True
