"""Stock SGLang's `/update_weights_from_ipc`: checkpoint-engine's worker protocol, which old and new versions have.

One HTTP call lasts for the whole update. Meanwhile a ZeroMQ REP socket in every rank's worker takes one message after
the other: a buffer, the places of the tensors in it, the next buffer, and so on until None. The worker unpickles these
messages. Its answers are empty or the text of an error, and are never unpickled. After every bucket an empty buffer is
sent, so that the worker releases the slot, and the fence shows it, before the next bucket is sent.

The protocol cannot be abandoned: a worker whose peer dies waits for ever, and its server answers nothing meanwhile. So
this is not the default path. But the worker's socket reconnects: the next daemon binds to the same path again and ends
the update that a killed daemon left (`end_abandoned`). Sockets lie in /dev/shm, which an engine in a container has to
share anyway.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import platform
import shutil
import socket as sockets
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import zmq
import zmq.asyncio

from weightsync.adapters.sglang.path import EnginePath
from weightsync.adapters.sglang.path_stock import refuse_stock
from weightsync.adapters.sglang.payloads import close_buffer, end, open_buffer, tensor_list
from weightsync.adapters.sglang.profiles import numbers_of
from weightsync.errors import EngineError, EngineLost, EngineRefused, LocalProtocolError
from weightsync.ipc.segments import DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.adapters.sglang.server import Server, ServerFacts
    from weightsync.plan.manifest import Manifest

__all__ = ["IpcPath", "end_abandoned"]

_ON_CPU = (0, 5, 20)  # the first version that ran on a CPU; 0.5.15.post1 and 0.5.17 fail there
_LONGEST = 86400.0  # seconds for the HTTP call of a whole update; each step has a deadline of its own
_LINGER = 500  # milliseconds for a socket's last message to be sent after close
_OVERTAKEN = 1.0  # seconds by which the HTTP call's answer may come before a worker's last answer
_RECONNECT = 3.0  # seconds for a waiting worker to find the socket again; it tries ten times a second


class _Update:
    """An update under way: its sockets, in a directory that only this user may enter, and its HTTP call."""

    def __init__(self, server: Server, keys: Sequence[str], manifest: Manifest) -> None:
        self.manifest = manifest
        self._engine = server.engine
        self._directory = tempfile.mkdtemp(prefix=_prefix(server.http.url), dir=DIRECTORY)
        self._context = zmq.asyncio.Context()
        self._sockets = []
        handles = {}
        for rank, key in enumerate(keys):
            handles[key] = f"ipc://{self._directory}/{rank}"
            socket = _bound(self._context, handles[key])
            self._sockets.append(socket)
        body = {"zmq_handles": handles, "flush_cache": False}
        self._call = asyncio.create_task(server.call("/update_weights_from_ipc", body, deadline=monotonic() + _LONGEST))

    async def say(self, messages: Sequence[bytes], *, deadline: float) -> None:
        """Send `messages[rank]` to every rank, and return when every rank has answered without an error."""
        async with asyncio.TaskGroup() as group:
            for socket, message in zip(self._sockets, messages, strict=True):
                group.create_task(self._say(socket, message, deadline))

    async def ended(self, *, deadline: float) -> None:
        """Wait for the HTTP call to end. Raises the error that it failed with."""
        done, _ = await asyncio.wait({self._call}, timeout=max(deadline - monotonic(), 0))
        if not done:
            raise EngineLost(f"the checkpoint-engine worker of {self._engine} did not end in time", engine=self._engine)
        self._call.result()

    async def close(self) -> None:
        """Free everything. Workers that still listen are sent the end first."""
        if not self._call.done():
            await _end(self._sockets, _RECONNECT)
        for socket in self._sockets:
            socket.close()
        self._call.cancel()
        with suppress(asyncio.CancelledError, EngineError):
            await self._call
        await asyncio.to_thread(self._context.term)
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _say(self, socket: zmq.asyncio.Socket, message: bytes, deadline: float) -> None:
        answer = asyncio.create_task(_exchange(socket, message))
        try:
            left = max(deadline - monotonic(), 0)
            await asyncio.wait({answer, self._call}, timeout=left, return_when="FIRST_COMPLETED")
            if self._call.done() and not answer.done():
                self._call.result()
                await asyncio.wait({answer}, timeout=_OVERTAKEN)
            if not answer.done():
                raise EngineLost(f"the checkpoint-engine worker of {self._engine} does not answer", engine=self._engine)
            if text := answer.result():
                who = f"the checkpoint-engine worker of {self._engine}"
                raise EngineError(f"{who} says: {text[:600]!r}", engine=self._engine)
        finally:
            answer.cancel()


async def end_abandoned(url: str, *, deadline: float) -> None:
    """End the updates that killed daemons of this user have left in the server at `url`; its workers wait in them."""
    for directory in _abandoned(url):
        with zmq.asyncio.Context() as context, suppress(FileNotFoundError):
            waiting = [_bound(context, f"ipc://{directory}/{rank}") for rank in os.listdir(directory)]
            await _end(waiting, min(deadline - monotonic(), _RECONNECT))
            for socket in waiting:
                socket.close(0)
        shutil.rmtree(directory, ignore_errors=True)


async def _end(waiting: Sequence[zmq.asyncio.Socket], seconds: float) -> None:
    """Send workers the end and wait for their answers, at most `seconds`: there may be no workers."""
    with suppress(TimeoutError, zmq.ZMQError):
        async with asyncio.timeout(seconds):
            await asyncio.gather(*(_exchange(socket, end()) for socket in waiting))


def _abandoned(url: str) -> list[Path]:
    """Find directories of sockets that this user made for a server, and that no process listens at any more."""
    found = []
    for directory in Path(DIRECTORY).glob(_prefix(url) + "*"):
        with suppress(FileNotFoundError):  # its daemon has just removed it
            about, sockets_there = directory.lstat(), directory.iterdir()
            if stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid() and not any(map(_alive, sockets_there)):
                found.append(directory)
    return found


def _prefix(url: str) -> str:
    """Return how the names of a server's socket directories begin, so that the next daemon finds them."""
    return f"weightsync-ce-{hashlib.blake2b(url.encode(), digest_size=6).hexdigest()}-"


def _alive(path: Path) -> bool:
    """Whether a process listens at this socket."""
    with sockets.socket(sockets.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _bound(context: zmq.asyncio.Context, address: str) -> zmq.asyncio.Socket:
    socket = context.socket(zmq.REQ)
    socket.setsockopt(zmq.LINGER, _LINGER)
    socket.setsockopt(zmq.REQ_RELAXED, 1)  # the end can be sent to a worker that has not answered
    socket.setsockopt(zmq.REQ_CORRELATE, 1)
    socket.bind(address)
    return socket


async def _exchange(socket: zmq.asyncio.Socket, message: bytes) -> bytes:
    await socket.send(message)  # waits until a worker connects
    answer: bytes = await socket.recv()
    return answer


class IpcPath(EnginePath):
    """Sends buckets as checkpoint-engine's buffers."""

    name = "ipc"

    def __init__(self, server: Server, facts: ServerFacts, gpus: Sequence[str | None]) -> None:
        """`gpus` are the UUIDs of the ranks' GPUs, by tp_rank; None for ranks on a CPU."""
        self._server = server
        self._facts = facts
        self._gpus = gpus
        self.transport = "torch-shm" if gpus[0] is None else "torch-cuda"
        self._update: _Update | None = None
        self._closing: set[asyncio.Task[None]] = set()

    async def accept(self, manifest: Manifest, *, deadline: float) -> tuple[str, ...] | None:
        """See the base class. Stock servers do not say which names they know; the adapter checked their checkpoint."""
        refuse_stock(manifest, self._server.engine)
        problem = hint = None
        numbers = numbers_of(self._facts.version)
        if self._gpus[0] is None and numbers is not None and numbers < _ON_CPU:
            problem = f"on a CPU SGLang {self._facts.version} asks CUDA for its UUID all the same"
        elif self._gpus[0] is None and self._facts.tp_size > 1:
            problem = "on a CPU every rank looks for the same handle, so only --tp 1 can be served this way"
        elif self._facts.quantization:
            problem = f"it quantises to {self._facts.quantization!r}, and this path does not restore packed weights"
        elif self._facts.speculative_algorithm:
            problem = "it would ask for everything once more for its draft model"
        if problem:
            hint = 'path = "tensor", or the engine\'s plugin'
            raise EngineRefused(
                f"/update_weights_from_ipc cannot be used here: {problem}",
                engine=self._server.engine,
                phase="accept",
                hint=hint,
            )
        return None

    async def begin(self, manifest: Manifest, offers: Sequence[Sequence[bytes]], *, deadline: float) -> None:
        """See the base class. Nothing is attached to: each bucket comes with its own handle."""
        await self.close()
        keys = [f"GPU-{platform.machine() if gpu is None else gpu}" for gpu in self._gpus]
        self._update = _Update(self._server, keys, manifest)

    async def load(self, bucket: int, tickets: Sequence[bytes], *, deadline: float) -> None:
        update = self._open()
        steps = (
            [open_buffer(ticket, gpu) for ticket, gpu in zip(tickets, self._gpus, strict=True)],
            [tensor_list(update.manifest, bucket)] * len(tickets),
            [close_buffer()] * len(tickets),
        )
        for messages in steps:
            await self._say(messages, deadline)

    async def finish(self, *, deadline: float) -> None:
        update = self._open()
        await self._say([end()] * self._facts.tp_size, deadline)
        await update.ended(deadline=deadline)
        await self.close()

    async def close(self) -> None:
        """End the open update."""
        update, self._update = self._update, None
        if update is not None:
            closing = asyncio.create_task(update.close())  # runs to its end even if the caller is cancelled
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            await asyncio.shield(closing)

    async def _say(self, messages: Sequence[bytes], deadline: float) -> None:
        try:
            await self._open().say(messages, deadline=deadline)
        except BaseExceptionGroup as group:
            await self.close()
            raise next((e for e in group.exceptions if not isinstance(e, EngineLost)), group.exceptions[0]) from None

    def _open(self) -> _Update:
        if self._update is None:
            raise LocalProtocolError("no update is open", engine=self._server.engine, hint="begin first")
        return self._update
