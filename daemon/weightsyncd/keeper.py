"""Drives a keeper: the process that keeps the last push in host memory.

To a push, a keeper is an engine of one rank that serves no requests and is never torn: it keeps a version until a newer
push is committed. The process starts when it is first needed and ends with the daemon. A keeper that does not answer is
replaced, and nothing is kept until the next push.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

import weightsync
from weightsync.adapters.base import EngineAdapter, EngineInfo, PauseMode
from weightsync.errors import EngineLost
from weightsync.keeper import commands as c
from weightsync.wire import messages as msg
from weightsync.wire.pipe import HEADER, MAX_FRAME

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weightsync.config import LogConfig
    from weightsync.plan.boxes import Words
    from weightsync.plan.manifest import Manifest

__all__ = ["KeeperAdapter"]

logger = logging.getLogger(__name__)

_PROBE = 10.0  # seconds for a keeper to start, or to answer, while a push waits
_REAP = 5.0  # seconds from SIGKILL to the end of a process; longer only if the kernel itself is stuck
_ROOT = str(Path(next(iter(weightsync.__path__))).parent)


class _Process(NamedTuple):
    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    incarnation: str


class KeeperAdapter(EngineAdapter):
    """See the module. Commands wait while the keeper works on an earlier one."""

    def __init__(
        self, model: str, endpoint: str, log: LogConfig, newest: Callable[[str], int | None], *, gpu: str = ""
    ) -> None:
        """`endpoint` is the daemon's: the keeper calls it as a trainer does when it pushes. `newest` returns the last
        committed version of a model. `gpu` is the UUID of the GPU through which it reads slots on GPUs.
        """
        self._newest = newest
        self._gpu = gpu
        self._model = model
        self._endpoint = endpoint
        self._log = log
        self._running: _Process | None = None
        self._kept = c.Reply()
        self._paused = False
        self._finished = False
        self._turn = asyncio.Lock()
        self._asking: set[asyncio.Task[c.Reply]] = set()

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._alive() is not None

    @property
    def version(self) -> int | None:
        """The version that is kept, if one is."""
        return self._kept.version if self._alive() is not None else None

    def status(self) -> msg.KeeperStatus:
        """Return its status, for operators."""
        running = self._alive()
        pid, kept = (running.process.pid, self._kept) if running is not None else (None, c.Reply())
        return msg.KeeperStatus(model=self._model, pid=pid, version=kept.version, nbytes=kept.nbytes)

    async def warm(self, *, deadline: float) -> None:
        """Start the process before it is needed: its imports take seconds. A failure is only logged."""
        try:
            await self._ask(c.Hello(), deadline)
        except EngineLost as error:
            logger.warning("[model=%s] keeper.failed: %s", self._model, error.message)

    # --- as an engine of a push -----------------------------------------------------------------------------------

    async def probe(self, *, deadline: float) -> EngineInfo:
        """Start the process if it does not run, and ask what it keeps. Takes at most `_PROBE` seconds of a push."""
        reply = await self._ask(c.Hello(), min(deadline, time.monotonic() + _PROBE))
        return EngineInfo(
            software="weightsync keeper",
            profile="keeps what is pushed in host memory",
            tp_size=1,
            version=reply.version,
            paused=self._paused,
            torn=False,
            incarnation=self._running.incarnation if self._running is not None else "",
        )

    async def accept(self, manifest: Manifest, *, deadline: float) -> tuple[str, ...]:
        """Accept any manifest. `begin` finds out whether there is room for it."""
        return ()

    async def pause(self, mode: PauseMode, *, deadline: float) -> None:
        """There is nothing to pause."""
        self._paused = True

    async def begin(
        self, version: int, manifest: Manifest, offers: Sequence[Sequence[bytes]], *, deadline: float
    ) -> None:
        """Begin an update. The kept version stays until a finished update is resumed."""
        self._finished = False
        await self._ask(
            c.Begin(version, self._newest(self._model), manifest.pack(), tuple(offers[0]), deadline), deadline
        )

    async def load(self, bucket: int, tickets: Sequence[bytes], *, deadline: float) -> None:
        """Have it copy a bucket; the slot is free when this returns."""
        await self._ask(c.Load(bucket, tickets[0], deadline), deadline)

    async def finish(self, version: int, *, deadline: float) -> None:
        """Have it check that everything came."""
        await self._ask(c.Finish(), deadline)
        self._finished = True

    async def verify(self, manifest: Manifest, expected: Words, *, deadline: float) -> int | None:
        """Check nothing: buckets were checked as they came, and a repeat verifies the engines that get them."""
        return None

    async def resume(self, *, deadline: float) -> None:
        """Have it keep the finished update from now on: an engine serves it."""
        if self._finished:
            self._finished = False
            await self._ask(c.Commit(), deadline)
        self._paused = False

    async def settle(self, *, whole: int | None, deadline: float) -> None:
        """Tell it that the push is over. `whole`: its version, if it committed and brought all that engines hold."""
        if self.alive:
            with suppress(EngineLost):
                await self._ask(c.Settle(whole), deadline)

    async def close(self) -> None:
        """End the process, whatever it is doing. What it kept is lost."""
        await self._end()

    # --- as a trainer ---------------------------------------------------------------------------------------------

    async def repeat(self, engines: Sequence[str], *, deadline: float) -> None:
        """Have it push what it keeps to these engines. Raises the push's error; `PushAborted` names failed engines."""
        await self._ask(c.Repeat(tuple(engines), deadline), deadline)

    # --- the process ----------------------------------------------------------------------------------------------

    async def _ask(self, command: c.Command, deadline: float) -> c.Reply:
        """Send a command and return the reply. Raises the error of the reply, or `EngineLost` if there is none.

        If the caller gives up waiting, the reply is still read, so that the next command gets its own.
        """
        asking = asyncio.create_task(self._exchange(command, deadline))
        self._asking.add(asking)
        asking.add_done_callback(self._asked)
        reply = await asyncio.shield(asking)
        if reply.error is not None:
            raise reply.error.error()
        return reply

    def _asked(self, asking: asyncio.Task[c.Reply]) -> None:
        self._asking.discard(asking)
        if not asking.cancelled() and (error := asking.exception()) is not None:
            logger.debug("[model=%s] keeper.failed: %s", self._model, error)  # the caller may have given up

    async def _exchange(self, command: c.Command, deadline: float) -> c.Reply:
        what = type(command).__name__.lower()
        left = max(0.0, deadline + _grace(deadline) - time.monotonic())
        try:
            async with asyncio.timeout(left):
                await self._turn.acquire()
        except TimeoutError as error:
            raise EngineLost(f"the keeper of model {self._model!r} is busy with something else") from error
        try:
            try:
                async with asyncio.timeout(max(0.0, deadline + _grace(deadline) - time.monotonic())):
                    running = self._alive() or await self._start()
                    reply = await _said(running, command)
            except (TimeoutError, OSError, EOFError, msgspec.MsgspecError) as error:
                await self._end()
                why = f"did not answer {what!r} in time" if isinstance(error, TimeoutError) else f"is gone: {error}"
                raise EngineLost(f"the keeper of model {self._model!r} {why}", hint="it is started anew") from error
            except BaseException:
                await self._end()
                raise
            self._kept = reply
            return reply
        finally:
            self._turn.release()

    def _alive(self) -> _Process | None:
        running = self._running
        gone = running is None or running.process.returncode is not None or running.reader.at_eof()
        return None if gone else running

    async def _start(self) -> _Process:
        await self._end()
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                # -P: the working directory of the daemon is not searched for modules. A session of its own: a Ctrl-C on
                # the daemon's terminal reaches the daemon alone. One GPU, or none.
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", "weightsync.keeper", "--pipe", str(theirs.fileno())),
                    *("--daemon", self._endpoint, "--model", self._model),
                    *("--log-level", self._log.level, "--log-format", self._log.format),
                    *(("--gpu",) if self._gpu else ()),
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    env=os.environ
                    | {
                        "CUDA_VISIBLE_DEVICES": f"GPU-{self._gpu}" if self._gpu else "",
                        "PYTHONPATH": os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH")))),
                    },
                )
            reader, writer = await asyncio.open_unix_connection(sock=ours)
        except BaseException:
            ours.close()
            raise
        self._running = _Process(process, reader, writer, f"{process.pid}-{secrets.token_hex(4)}")
        await _said(self._running, c.Hello())
        logger.info("[model=%s] keeper.ready pid=%d", self._model, process.pid)
        return self._running

    async def _end(self) -> None:
        running, self._running = self._running, None
        self._kept, self._finished = c.Reply(), False
        if running is None:
            return
        running.writer.close()
        with suppress(ProcessLookupError):
            running.process.kill()
        try:
            async with asyncio.timeout(_REAP):
                await running.process.wait()
        except TimeoutError:
            logger.error("[model=%s] keeper %d does not die", self._model, running.process.pid)  # noqa: TRY400


async def _said(running: _Process, command: c.Command) -> c.Reply:
    frame = msgspec.msgpack.encode(command)
    running.writer.write(HEADER.pack(len(frame)) + frame)
    await running.writer.drain()
    (size,) = HEADER.unpack(await running.reader.readexactly(HEADER.size))
    if size > MAX_FRAME:
        raise EOFError(f"an answer of {size} bytes was announced")
    return msgspec.msgpack.decode(await running.reader.readexactly(size), type=c.Reply)


def _grace(deadline: float) -> float:
    """Return for how many seconds beyond a deadline a keeper's own answer at that deadline is waited for."""
    return min(1.0, max(0.0, deadline - time.monotonic()) / 10)
