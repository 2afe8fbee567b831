"""`weightsync doctor`: what would fail, before any push, and the exact flag or variable that mends it.

The engine's own adapter looks at what it says over HTTP (`EngineAdapter.examine`); here is what can be seen from the
outside: which brand it is, and whether its process shares with this one what a push needs to be shared. Nothing is
changed, and nothing is sent but questions.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from weightsync.adapters import adapter
from weightsync.adapters.base import Finding
from weightsync.adapters.http import EngineAnswer, EngineHttp
from weightsync.config import EngineConfig, is_loopback, url_problems
from weightsync.errors import ConfigError, EngineError, EngineLost, WeightSyncError
from weightsync.gpus import all_gpus, seen_by
from weightsync.processes import environment, listener, same_namespace

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["brand_of", "examine"]

_ROOM = 1 << 30  # bytes of free shared memory under which arenas will hardly fit
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


async def brand_of(spec: EngineConfig, *, deadline: float) -> str:
    """Which kind of engine answers at the URL. Raises `EngineLost`, or `EngineError` if it is none that is known."""
    http = EngineHttp(spec)
    try:
        for path, kind, mark in (
            ("/server_info", "sglang", "internal_states"),
            ("/get_server_info", "sglang", "internal_states"),
            ("/version", "vllm", "version"),
            ("/info", "reference", "incarnation"),
        ):
            with suppress(EngineAnswer):
                answer = await http.get(path, deadline=deadline)
                if isinstance(answer, dict) and mark in answer:
                    return kind
    finally:
        await http.close()
    raise EngineError(
        f"what answers at {spec.url} is neither vLLM nor SGLang nor a reference engine",
        engine=spec.name,
        hint="is this the engine's own URL, and not its router's? Else say which it is with --kind",
    )


def examine(spec: EngineConfig, *, timeout: float = 10.0) -> list[Finding]:
    """Everything about one engine, the worst first. `spec.kind` may be "auto". Raises nothing that is its fault."""
    if problems := url_problems(spec.url):
        return [Finding(level="fail", what=f"the engine's url {problem}") for problem in problems]
    deadline = time.monotonic() + timeout
    try:
        found = list(asyncio.run(_ask(spec, deadline)))
    except EngineLost as error:
        found = [Finding(level="fail", what=error.message, fix=error.hint or _start_hint(spec.url))]
    except WeightSyncError as error:
        found = [Finding(level="fail", what=error.message, fix=error.hint or "")]
    found += _process(spec.url)
    found += _here(os.environ)
    order = {"fail": 0, "warn": 1, "ok": 2}
    return sorted(found, key=lambda finding: order[finding.level])


async def _ask(spec: EngineConfig, deadline: float) -> Sequence[Finding]:
    if spec.kind == "auto":
        spec = msgspec.structs.replace(spec, kind=await brand_of(spec, deadline=deadline))
    hand = adapter(spec)
    try:
        return await hand.examine(deadline=deadline)
    finally:
        await hand.close()


def _start_hint(url: str) -> str:
    return f"start the engine, or correct the URL; `curl {url}/health` should answer"


def _process(url: str) -> list[Finding]:
    """What the engine's process shares with this one, where it can be seen."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    if not _is_here(host):
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
    found = []
    uid = os.geteuid()
    with suppress(OSError):  # it has ended meanwhile
        uid = os.stat(f"/proc/{pid}").st_uid
    if uid != os.geteuid():
        found.append(
            Finding(
                level="fail",
                what=f"the engine runs as user {uid}, you are {os.geteuid()}: arenas are private to their user",
                fix="run weightsyncd as the engine's user",
            )
        )
    found.append(_shared_memory(pid))
    if not same_namespace(pid, "pid"):
        found.append(
            Finding(
                level="warn",
                what="the engine has a PID namespace of its own: CUDA IPC may refuse its handles",
                fix="docker run --pid=host",
            )
        )
    found += _visible_gpus(environment(pid))
    return found


def _shared_memory(pid: int) -> Finding:
    ours = os.stat("/dev/shm")
    try:
        theirs = os.stat(f"/proc/{pid}/root/dev/shm")
    except OSError as error:
        return Finding(
            level="warn",
            what=f"/dev/shm of the engine (pid {pid}) cannot be seen: {error.strerror}",
            fix="docker run --ipc=host, as the same user",
        )
    if (ours.st_dev, ours.st_ino) != (theirs.st_dev, theirs.st_ino):
        return Finding(
            level="fail",
            what=f"the engine (pid {pid}) has a /dev/shm of its own: it cannot map the daemon's memory",
            fix="docker run --ipc=host, or mount one volume as /dev/shm in both containers",
        )
    free = shutil.disk_usage("/dev/shm").free
    if free < _ROOM:
        return Finding(
            level="warn",
            what=f"only {free / 2**20:.0f} MiB are free in /dev/shm",
            fix="docker run --shm-size=16g, or fewer and smaller slots: arena.slots, arena.slot_bytes",
        )
    return Finding(level="ok", what=f"/dev/shm is shared with the engine (pid {pid}), {free / 2**30:.1f} GiB free")


def _visible_gpus(theirs: Mapping[str, str]) -> list[Finding]:
    wanted = theirs.get("CUDA_VISIBLE_DEVICES", "")
    if not wanted.strip():
        return []
    gpus = all_gpus()
    try:
        seen = seen_by(theirs, gpus)
    except ConfigError as error:
        return [Finding(level="fail", what=f"the engine runs on {error.message}", fix=error.hint or "")]
    if gpus and len(seen) < len(wanted.split(",")):
        return [
            Finding(
                level="fail",
                what=f"the engine's CUDA_VISIBLE_DEVICES={wanted} names GPUs that are not visible here",
                fix="start weightsyncd where all of the node's GPUs are visible; it needs no CUDA_VISIBLE_DEVICES",
            )
        ]
    return []


def _here(environ: Mapping[str, str]) -> list[Finding]:
    """This shell's own environment, which a trainer started from it would inherit."""
    return [
        Finding(
            level="warn",
            what=f"{name}={environ[name]}: memory in expandable segments cannot be shared by CUDA IPC handles",
            fix=f"unset {name} for weightsyncd; a trainer may keep it, for its weights are copied out of its memory",
        )
        for name in _ALLOCATOR
        if "expandable_segments:true" in environ.get(name, "").lower().replace(" ", "")
    ]


def _is_here(host: str) -> bool:
    if is_loopback(host):
        return True
    addresses: set[Any] = set()
    with suppress(OSError):
        addresses = {found[4][0] for found in socket.getaddrinfo(host, None)}
    for address in addresses:
        family = socket.AF_INET6 if ":" in str(address) else socket.AF_INET
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))  # only an address of this machine can be bound
            return True
    return False
