"""Examines an engine's process, if it can be seen: what it shares with this one, which stands in for weightsyncd."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from weightsync.adapters.base import Finding
from weightsync.doctor.environments import examine_environment
from weightsync.doctor.sizes import size
from weightsync.endpoints import is_here
from weightsync.errors import ConfigError
from weightsync.gpus import seen_by
from weightsync.processes import command, environment, listener, same_namespace

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightsync.doctor.node import Node

__all__ = ["examine_process"]

_PROXIES = ("docker-proxy", "rootlesskit", "rootlessport", "slirp4netns", "pasta", "gvproxy")
_NAMESPACES = {"ipc": "an IPC namespace", "pid": "a PID namespace"}


def examine_process(url: str, node: Node) -> list[Finding]:
    """Examine the process that listens at `url`, for the slots of `node`."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    if not is_here(host):
        return [
            Finding(
                level="fail",
                what=f"{host} is another machine: a daemon serves the engines of its own node",
                fix="run weightsyncd beside that engine and name it in [cluster.peers] here",
            )
        ]
    pid = listener(port)
    if pid is None:
        return [
            Finding(
                level="warn",
                what=f"the process that listens on port {port} cannot be seen from here (a container, another user?)",
                fix="share memory and processes with it: docker run --ipc=host --pid=host, as the same user",
            )
        ]
    if (name := command(pid)) in _PROXIES:
        return [
            Finding(
                level="warn",
                what=f"port {port} is passed on to a container by {name}: the engine's own process is not seen",
                fix="docker run --network=host --ipc=host --pid=host, which shares what a push needs and lets one look",
            )
        ]
    found = [*_user(pid), _shared_memory(pid, node.config.node.shm_dir)]
    if node.on_gpus:
        found += _namespaces(pid)
        found += _visible_gpus(environment(pid), node)
    return found + examine_environment(pid)


def _user(pid: int) -> list[Finding]:
    uid = os.geteuid()
    with suppress(OSError):  # the process has ended meanwhile
        uid = os.stat(f"/proc/{pid}").st_uid
    if uid == os.geteuid():
        return []
    return [
        Finding(
            level="fail",
            what=f"the engine runs as user {uid}, you are {os.geteuid()}: arenas are private to their user",
            fix="run weightsyncd as the engine's user",
        )
    ]


def _shared_memory(pid: int, directory: str) -> Finding:
    try:
        ours = os.stat(directory)
    except OSError as error:
        return Finding(level="fail", what=f"{directory} cannot be seen here: {error.strerror}")
    seen = f"/proc/{pid}/root{directory}"
    try:
        theirs, room = os.stat(seen), shutil.disk_usage(seen)
    except OSError as error:
        return Finding(
            level="warn",
            what=f"{directory} of the engine (pid {pid}) cannot be seen: {error.strerror}",
            fix="docker run --ipc=host, as the same user",
        )
    if (ours.st_dev, ours.st_ino) != (theirs.st_dev, theirs.st_ino):
        return Finding(
            level="fail",
            what=f"the engine (pid {pid}) has a {directory} of its own, of {size(room.total)}: it cannot map arenas, "
            "of which at least the fences lie there",
            fix=f"docker run --ipc=host, or mount one volume as {directory} in both containers",
        )
    return Finding(level="ok", what=f"{directory} is shared with the engine (pid {pid}), {size(room.free)} free")


def _namespaces(pid: int) -> list[Finding]:
    """Judge namespaces: CUDA IPC handles are valid only within one IPC and one PID namespace."""
    found = []
    for kind, called in _NAMESPACES.items():
        same, fix = same_namespace(pid, kind), f"docker run --{kind}=host, for the engine and for weightsyncd"
        if same is None:
            what = f"whether the engine (pid {pid}) has {called} of its own cannot be seen"
            found.append(Finding(level="warn", what=what, fix=f"look as the same user; {fix}"))
        elif not same:
            what = f"the engine (pid {pid}) has {called} of its own: it cannot open slots on GPUs, shared by CUDA IPC"
            found.append(Finding(level="fail", what=what, fix=fix))
    return found or [
        Finding(level="ok", what=f"the engine (pid {pid}) has our IPC and PID namespaces, as CUDA IPC wants")
    ]


def _visible_gpus(theirs: Mapping[str, str], node: Node) -> list[Finding]:
    """Judge the engine's GPUs. GPUs without slots are fine: an engine opens any GPU's handles on its own GPU."""
    wanted = theirs.get("CUDA_VISIBLE_DEVICES", "").strip()
    try:
        seen = seen_by(theirs, [gpu.uuid for gpu in node.gpus])
    except ConfigError as error:
        return [Finding(level="fail", what=f"the engine runs on {error.message}", fix=error.hint or "")]
    if wanted and len(seen) < len(wanted.split(",")):
        return [
            Finding(
                level="warn",
                what=f"the engine's CUDA_VISIBLE_DEVICES={wanted} names GPUs that are not visible here: whether they "
                "reach the slots cannot be told, nor which they are, as stock paths need to",
                fix="run weightsyncd where all of the node's GPUs are visible, or name the engine's GPUs in its config",
            )
        ]
    divided = [gpu.uuid for gpu in node.gpus if gpu.mig and gpu.uuid in seen and gpu.uuid not in node.config.node.gpus]
    if wanted and divided:
        what = (
            f"the engine runs on GPU {divided[0]}, which is in MIG mode: its instances cannot map slots on other GPUs"
        )
        return [Finding(level="fail", what=what, fix="an engine on whole GPUs")]
    return []
