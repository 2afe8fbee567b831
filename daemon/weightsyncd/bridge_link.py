"""One bridge process, from its start to its end: requests out, answers in, matched by id.

A link is used once: when its process ends, its pipe breaks or it does not answer in time, `ended` is set with the
reason and every request under way fails. `weightsyncd.bridges` makes the next one.
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import weightsync
from weightsync.errors import (
    CodecError,
    LocalProtocolError,
    TransportBroken,
    TransportClosed,
    TransportTimeout,
    WeightSyncError,
)
from weightsync.ipc.arena import MAX_READERS
from weightsync.ipc.segments import DIRECTORY, discard, discard_exports, segment_name
from weightsync.nccl_bridge import commands as c
from weightsync.nccl_bridge import frames
from weightsync.processes import started

__all__ = ["BridgeConfig", "BridgeLink"]

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=c.Reply)

# seconds, or a tenth of the time left if that is less: the bridge's own deadline is earlier, so that it answers in time
_MARGIN = 0.5
_LONGEST = 1e6  # seconds that a command can be given
_FAIR = 1.0  # seconds; no bridge is taken for wedged sooner after a request, however short the deadline was
_REAP = 5.0  # seconds from SIGKILL to the end of a process; longer only if the kernel itself is stuck
_ROOT = str(Path(next(iter(weightsync.__path__))).parent)


@dataclass(frozen=True, kw_only=True)
class BridgeConfig:
    """The config that one bridge is started with."""

    node: str
    index: int
    slots: int
    slot_bytes: int
    readers: int = MAX_READERS
    directory: str = DIRECTORY
    gpu: str = ""  # UUID of the GPU that its slots lie on
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["human", "json"] = "human"

    @property
    def name(self) -> str:
        """ "node/index", also its name as a peer."""
        return f"{self.node}/{self.index}"


class BridgeLink:
    """A running bridge process. Made by `open`; used from one asyncio loop."""

    def __init__(self, config: BridgeConfig, incarnation: str, process: asyncio.subprocess.Process) -> None:
        self.config = config
        self.incarnation = incarnation
        self.pid = process.pid
        self.ended: asyncio.Future[WeightSyncError] = asyncio.get_running_loop().create_future()
        self.offer = b""
        self._process = process
        self._waiting: dict[int, asyncio.Future[frames.Response]] = {}
        self._next_id = 1
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, config: BridgeConfig, *, deadline: float) -> BridgeLink:
        """Start a bridge and wait until it has its arena. If that fails, raises why, and nothing of it is left."""
        incarnation = secrets.token_hex(8)
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await _spawn(config, incarnation, theirs.fileno())
        except BaseException as error:
            ours.close()
            if isinstance(error, OSError):
                raise TransportBroken(f"bridge {config.name} cannot be started: {error}") from error
            raise
        link = cls(config, incarnation, process)
        try:
            reader, link._writer = await asyncio.open_unix_connection(sock=ours, limit=frames.MAX_FRAME)
            link._reading = asyncio.create_task(link._read(reader), name=f"bridge {config.name} reader")
            ready = await link.call(c.Hello(), deadline=deadline)
        except BaseException:
            await link.end()
            ours.close()
            raise
        link.offer = ready.offer
        logger.info("[bridge=%s] start.complete pid=%d incarnation=%s", config.name, link.pid, incarnation)
        return link

    async def call(self, command: c.Command[R], *, deadline: float) -> R:
        """Send `command` and return its reply. Raises as `weightsyncd.bridges.Bridge.call` does."""
        if self.ended.done():
            raise self._lost(self.ended.result())
        assert self._writer is not None  # set by `open`, the only way to a link
        left = min(deadline - time.monotonic(), _LONGEST)
        if left <= 0:
            raise TransportTimeout(f"{_what(command)} of bridge {self.config.name}: its deadline passed")
        number, self._next_id = self._next_id, self._next_id + 1
        make = partial(_frame, number, left - min(_MARGIN, left / 10), command)
        # encoding the tables of a whole model takes tenths of a second, which would hold up the event loop
        frame = await asyncio.to_thread(make) if isinstance(command, c.Prepare) else make()
        if self.ended.done():
            raise self._lost(self.ended.result())
        answer: asyncio.Future[frames.Response] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda _: self._waiting.pop(number, None))
        self._waiting[number] = answer
        self._writer.write(frame)
        try:
            async with asyncio.timeout(left):
                response = await asyncio.shield(answer)
        except TimeoutError:
            self._doubt(answer, command, left)
            raise TransportTimeout(
                f"bridge {self.config.name} did not answer {_what(command)} in {left:.1f} s",
                hint="a bridge that does not answer is killed and started again",
            ) from None
        except asyncio.CancelledError:
            answer.cancel()
            raise
        if response.error is not None:
            raise response.error.error()
        if not isinstance(response.reply, command.reply):
            broken = TransportBroken(
                f"bridge {self.config.name} answered {_what(command)} with {_what(response.reply)}"
            )
            self._end(broken)
            raise broken
        return response.reply  # type: ignore[return-value]

    async def end(self, *, deadline: float | None = None) -> None:
        """End the process, gracefully until `deadline` if there is one, and then by force; remove its arena."""
        if deadline is not None and not self.ended.done():
            with suppress(WeightSyncError, TimeoutError):
                async with asyncio.timeout_at(_loop_time(deadline)):
                    await self.call(c.Stop(), deadline=deadline)
                    await self._process.wait()
        self._end(TransportClosed(f"bridge {self.config.name} was stopped"))
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()
        try:
            async with asyncio.timeout(_REAP):
                await self._process.wait()
        except TimeoutError:
            logger.error("[bridge=%s] process %d does not die", self.config.name, self.pid)  # noqa: TRY400
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        if self._writer is not None:
            self._writer.close()
            with suppress(OSError):
                await self._writer.wait_closed()
        self._remove_arena()

    def _remove_arena(self) -> None:
        """Remove the arena of this incarnation alone: another daemon of this machine may use the same node name."""
        name = segment_name(self.config.node, self.config.index, self.incarnation)
        discard(self.config.directory, name)
        discard_exports(name)

    def give_up(self, reason: str) -> None:
        """Take the bridge for lost: pending calls fail now, and `ended` is set."""
        self._end(TransportBroken(f"bridge {self.config.name} was replaced: {reason}"))

    def _doubt(self, answer: asyncio.Future[frames.Response], command: c.Command[R], waited: float) -> None:
        """Take a bridge that missed a deadline for wedged, once it has had `_FAIR` seconds to answer."""

        def decide() -> None:
            if not answer.done():
                self._end(TransportBroken(f"bridge {self.config.name} is wedged: no answer to {_what(command)}"))

        if waited >= _FAIR:
            decide()
        else:
            asyncio.get_running_loop().call_later(_FAIR - waited, decide)

    def _end(self, error: WeightSyncError) -> None:
        """Set `ended` to the reason, and fail every pending call."""
        if self.ended.done():
            return
        self.ended.set_result(error)
        for answer in list(self._waiting.values()):
            if not answer.done():
                answer.set_exception(self._lost(error))
                answer.exception()  # marks it as seen: asyncio need not log it if the caller has given up waiting

    def _lost(self, error: WeightSyncError) -> WeightSyncError:
        if isinstance(error, TransportClosed):
            return TransportClosed(error.message)
        return TransportBroken(f"bridge {self.config.name} ended under way: {error.message}", hint=error.hint)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Match answers to requests until the pipe ends."""
        try:
            while True:
                header = await reader.readexactly(frames.HEADER.size)
                response = frames.decode_response(await reader.readexactly(frames.frame_length(header)))
                answer = self._waiting.get(response.id)
                if answer is not None and not answer.done():
                    answer.set_result(response)
        except (asyncio.IncompleteReadError, OSError):
            self._end(TransportBroken(f"bridge {self.config.name} (pid {self.pid}) is gone{await self._how()}"))
        except CodecError as error:
            self._end(TransportBroken(f"bridge {self.config.name} sent nonsense: {error.message}"))

    async def _how(self) -> str:
        """Return how the process ended, for a message; empty if that is not known within a second."""
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                code = await self._process.wait()
                return f": killed by signal {-code}" if code < 0 else f": exit status {code}"
        return ""


async def _spawn(config: BridgeConfig, incarnation: str, fd: int) -> asyncio.subprocess.Process:
    arguments: dict[str, Any] = {
        "--fd": fd,
        "--node": config.node,
        "--index": config.index,
        "--incarnation": incarnation,
        "--shm-dir": config.directory,
        "--slots": config.slots,
        "--slot-bytes": config.slot_bytes,
        "--readers": config.readers,
        "--gpu": config.gpu,
        "--daemon": f"{os.getpid()}:{started(os.getpid())}",
        "--log-level": config.log_level,
        "--log-format": config.log_format,
    }
    path = os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))
    visible = {"CUDA_VISIBLE_DEVICES": f"GPU-{config.gpu}" if config.gpu else ""}  # one GPU, or none
    flat = [str(part) for pair in arguments.items() for part in pair]
    # -P: the working directory of the daemon is not searched for modules. A session of its own: a Ctrl-C on the
    # daemon's terminal reaches the daemon alone.
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "weightsync.nccl_bridge",
        *flat,
        pass_fds=(fd,),
        start_new_session=True,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        env={**os.environ, **visible, "PYTHONPATH": path},
    )


def _frame(number: int, timeout: float, command: c.Command[R]) -> bytes:
    """Return the bytes of a request. They are checked here: a bridge takes malformed bytes for a broken pipe."""
    try:
        frame = frames.encode(frames.Request(id=number, timeout=timeout, command=command))  # type: ignore[arg-type]
        frames.decode_request(frame[frames.HEADER.size :])
    except CodecError as error:
        raise LocalProtocolError(f"{_what(command)} cannot be sent to a bridge: {error.message}") from error
    return frame


def _loop_time(deadline: float) -> float:
    return asyncio.get_running_loop().time() + (deadline - time.monotonic())


def _what(thing: object) -> str:
    return type(thing).__name__
