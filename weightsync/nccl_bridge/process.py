"""The bridge process: reads commands from its pipe, runs each in its lane, answers, and does not outlive the daemon.

Threads: the main thread reads the pipe and answers commands that need no waiting; `local` exports; `wire` works with
the communicator; `fence` watches the slots of `AwaitReleased`. Each command for a group has a thread of its own, and so
have loading torch and preparing a delivery. Answers come in the order in which work ends; ids match them to requests.

When the pipe ends, for whatever reason, the daemon is gone: the process removes the arena and exits. It does not wait
for threads that may be stuck in a collective, only a moment for stock engines that still have to open an export. `Stop`
does not wait for threads either.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from weightsync.errors import CodecError, TransportBroken, WeightSyncError
from weightsync.ipc.arena import Arena
from weightsync.ipc.cuda import DeviceSlots
from weightsync.nccl_bridge import commands as c
from weightsync.nccl_bridge import frames
from weightsync.nccl_bridge.service import BridgeService, Lane

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BridgeProcess", "Options"]

logger = logging.getLogger(__name__)

_SEND_SECONDS = 30  # to send an answer; a daemon that reads nothing from the pipe for so long is taken for dead
_LINGER = 2.0  # seconds that stock engines have to open the exports that the daemon told them of before it died
_POLL_FIRST = 50e-6  # seconds between two looks at awaited fences, growing to …
_POLL_LAST = 2e-3  # … this: under 1 % of a core however long the wait


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options that a bridge is started with."""

    fd: int  # its end of the pipe, a connected stream socket
    node: str
    index: int
    incarnation: str
    directory: str
    slots: int
    slot_bytes: int
    readers: int
    gpu: str = ""  # UUID of the one GPU that this process sees, if the slots lie there

    @property
    def name(self) -> str:
        """The bridge's name, "node/index", also as a peer."""
        return f"{self.node}/{self.index}"


@dataclass(frozen=True)
class Task:
    """A request on its way through a lane."""

    id: int
    command: c.AnyCommand
    deadline: float
    departures: int


class BridgeProcess:
    """The process as an object. `run` does not return."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._pipe = socket.socket(fileno=options.fd)
        self._pipe.setblocking(True)
        self._pipe.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", _SEND_SECONDS, 0))
        self._sending = threading.Lock()
        self._arena: Arena | None = None
        self._slots: DeviceSlots | None = None
        self._service: BridgeService | None = None

    def run(self) -> NoReturn:
        """Serve until `Stop` or the end of the pipe, then exit."""
        try:
            self._serve()
        except (OSError, WeightSyncError):
            logger.exception("pipe.failed")
        self._exit(1)

    def _serve(self) -> None:
        failed: WeightSyncError | None = None
        try:
            self._arena = self._make_arena()
        except WeightSyncError as error:  # each command is answered with it; there is none to answer yet
            failed = error
        lanes = None if self._arena is None else self._start_lanes(self._arena)
        while (request := self._read()) is not None:
            if lanes is not None:
                lanes.take(request)
            elif failed is not None:
                self._answer(frames.Response(id=request.id, error=failed.record()))
        logger.info("pipe.complete: the daemon is gone")
        if self._service is not None:
            self._service.linger(_LINGER)

    def _make_arena(self) -> Arena:
        o = self._options
        if o.gpu:
            self._slots = DeviceSlots.allocate(o.slots, o.slot_bytes, gpu=o.gpu, device=0)
        return Arena.create(
            node=o.node,
            bridge=o.index,
            incarnation=o.incarnation,
            slots=o.slots,
            slot_bytes=o.slot_bytes,
            readers=o.readers,
            directory=o.directory,
            memory=self._slots.memory if self._slots is not None else None,
        )

    def _start_lanes(self, arena: Arena) -> Lanes:
        self._service = BridgeService(self._options.name, self._options.incarnation, arena, self._slots)
        return Lanes(self._service, self._answer, self._stop)

    def _read(self) -> frames.Request | None:
        header = self._read_exactly(frames.HEADER.size)
        if header is None:
            return None
        body = self._read_exactly(frames.frame_length(header))
        return None if body is None else frames.decode_request(body)

    def _read_exactly(self, count: int) -> bytes | None:
        """Read `count` bytes from the pipe; None at its end.

        Waits without a deadline, because a bridge lives exactly as long as its daemon.
        """
        data = bytearray(count)
        view, got = memoryview(data), 0
        while got < count:
            try:
                more = self._pipe.recv_into(view[got:])
            except ConnectionResetError:
                return None
            if more == 0:
                return None
            got += more
        return bytes(data)

    def _answer(self, response: frames.Response) -> None:
        try:
            frame = frames.encode(response)
        except CodecError as error:
            frame = frames.encode(frames.Response(id=response.id, error=error.record()))
        try:
            with self._sending:
                self._pipe.sendall(frame)
        except OSError as error:
            logger.warning("answer.failed %s", error)
            self._exit(1)

    def _stop(self) -> NoReturn:
        self._exit(0)

    def _exit(self, status: int) -> NoReturn:
        if self._service is not None:
            self._service.close()
        if self._arena is not None:
            self._arena.unlink()
        logging.shutdown()
        os._exit(status)


class Lanes:
    """Runs each request in its lane. `answer` is called from several threads."""

    def __init__(
        self, service: BridgeService, answer: Callable[[frames.Response], None], stop: Callable[[], NoReturn]
    ) -> None:
        self._service = service
        self._send = answer
        self._stop = stop
        self._queues: dict[Lane, queue.Queue[Task]] = {
            lane: queue.Queue() for lane in (Lane.LOCAL, Lane.WIRE, Lane.FENCE)
        }
        for lane, work in ((Lane.LOCAL, self._work), (Lane.WIRE, self._work), (Lane.FENCE, self._watch)):
            threading.Thread(target=work, args=(self._queues[lane],), name=lane.name.lower(), daemon=True).start()

    def take(self, request: frames.Request) -> None:
        """Run a request that needs no waiting, or queue it."""
        if isinstance(request.command, c.Leave):
            self._service.interrupt()
        task = Task(request.id, request.command, time.monotonic() + request.timeout, self._service.departures)
        lane = self._service.lane(task.command)
        if lane is Lane.NOW:
            self._run(task)
        elif lane is Lane.GROUP:
            threading.Thread(target=self._run, args=(task,), name="group", daemon=True).start()
        else:
            self._queues[lane].put(task)
        if isinstance(task.command, c.Stop):
            self._stop()

    def _work(self, tasks: queue.Queue[Task]) -> None:
        while True:
            self._run(tasks.get())

    def _watch(self, tasks: queue.Queue[Task]) -> None:
        """Answer each `AwaitReleased` when its slot is free or its deadline passes."""
        waiting: list[Task] = []
        pause = _POLL_FIRST
        while True:
            try:
                waiting.append(tasks.get(timeout=pause) if waiting else tasks.get())
                pause = _POLL_FIRST
            except queue.Empty:
                pause = min(1.25 * pause, _POLL_LAST)
            waiting = [task for task in waiting if not self._run(task)]

    def _run(self, task: Task) -> bool:
        """Run a task and answer it. Returns False if it was not answered and must be run again."""
        try:
            reply = self._do(task)
        except WeightSyncError as error:
            self._send(frames.Response(id=task.id, error=error.record()))
        except Exception as error:  # last resort: a bug's error, too, must reach the daemon, which waits for an answer
            logger.exception("%s.failed", type(task.command).__name__.lower())
            broken = TransportBroken(f"bridge {self._service.name}: {type(error).__name__}: {error}")
            self._send(frames.Response(id=task.id, error=broken.record()))
        else:
            if reply is None:
                return False
            self._send(frames.Response(id=task.id, reply=reply))
        return True

    def _do(self, task: Task) -> c.AnyReply | None:
        command = task.command
        if isinstance(command, c.AwaitReleased):
            return self._service.released(command, deadline=task.deadline)
        if self._service.lane(command) is Lane.GROUP:
            return self._service.handle_group(command, deadline=task.deadline)
        if self._service.lane(command) is Lane.WIRE:
            return self._service.handle_wire(command, deadline=task.deadline, departures=task.departures)
        return self._service.handle(command)
