"""The engine's workers as one thing: started together, told the same, ended together."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
from http import HTTPStatus
from time import monotonic
from typing import TYPE_CHECKING

import msgspec

from weightsync.adapters.reference.commands import Reply
from weightsync.errors import ConfigError, EngineLost, TransportError
from weightsync.wire.pipe import Pipe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weightsync.adapters.reference.commands import Command

__all__ = ["WorkerGroup"]

logger = logging.getLogger(__name__)

_REPLY = msgspec.msgpack.Decoder(Reply)
_COLLECTIVE_SECONDS = 60.0  # the longest that a rank waits for another
_END_SECONDS = 5.0  # from closing the pipes to SIGKILL


class WorkerGroup:
    """The worker processes of one engine. Calls must not overlap: the engine takes turns."""

    def __init__(
        self,
        model: str,
        tp_size: int,
        *,
        load_format: str,
        device: str = "cpu",
        trial: str = "",
        log_level: str = "WARNING",
    ) -> None:
        self.tp_size = tp_size
        self._pipes: list[Pipe] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        # The ranks find each other through a file without a name, so that nothing is left behind however this ends.
        store = os.memfd_create("weightsync-reference-store")
        try:
            for rank in range(tp_size):
                options = ("--load-format", load_format, "--device", device, "--trial", trial, "--log-level", log_level)
                self._start(model, rank, store, options)
        finally:
            os.close(store)

    def _start(self, model: str, rank: int, store: int, options: Sequence[str]) -> None:
        ours, theirs = socket.socketpair()
        self._pipes.append(Pipe(ours))
        with theirs:
            command = [
                *(sys.executable, "-m", "weightsync.adapters.reference.worker"),
                *("--pipe", str(theirs.fileno()), "--store", str(store), "--parent", str(os.getpid())),
                *("--rank", str(rank), "--tp", str(self.tp_size), "--model", model),
                *("--collective-timeout", str(_COLLECTIVE_SECONDS), *options),
            ]
            self.processes.append(
                # A process group of its own: a terminal's Ctrl-C goes only to the front, which then ends its workers.
                subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(), store), process_group=0)
            )

    def wait_ready(self, *, deadline: float, unless: int) -> bool:
        """Wait until every worker holds its weights. Returns False if file descriptor `unless` is readable first.

        Raises `ConfigError` with the words of a worker that cannot start, `EngineLost` if a worker is silent.
        """
        poll = select.poll()
        poll.register(unless, select.POLLIN)
        waiting = {pipe.fileno(): pipe for pipe in self._pipes}
        for descriptor in waiting:
            poll.register(descriptor, select.POLLIN)
        while waiting:
            ready = [descriptor for descriptor, _ in poll.poll(max(deadline - monotonic(), 0) * 1000)]
            if unless in ready:
                return False
            if not ready:
                raise EngineLost("a worker did not get ready in time")
            for descriptor in ready:
                reply = self._reply(waiting.pop(descriptor), deadline)
                if reply.status != HTTPStatus.OK:
                    raise ConfigError(reply.error)
                poll.unregister(descriptor)
        return True

    def call(self, command: Command, *, deadline: float) -> list[Reply]:
        """Give every worker the same command. Returns and raises as `call_each`."""
        frame = msgspec.msgpack.encode(command)
        return self._exchange([frame] * self.tp_size, deadline)

    def call_each(self, command: Callable[[int], Command], *, deadline: float) -> list[Reply]:
        """Give each worker the command made for its tp_rank, and return the replies in the same order.

        Raises `EngineLost` if a worker is gone or does not answer by `deadline`. Commands and replies are then out of
        step, so the engine must end.
        """
        return self._exchange([msgspec.msgpack.encode(command(rank)) for rank in range(self.tp_size)], deadline)

    def _exchange(self, frames: list[bytes], deadline: float) -> list[Reply]:
        try:
            for pipe, frame in zip(self._pipes, frames, strict=True):
                pipe.send(frame, deadline=deadline)
        except TransportError as error:
            raise EngineLost(f"a worker is lost: {error}") from error
        return [self._reply(pipe, deadline) for pipe in self._pipes]

    def _reply(self, pipe: Pipe, deadline: float) -> Reply:
        try:
            return _REPLY.decode(pipe.receive(deadline=deadline))
        except (TransportError, msgspec.DecodeError) as error:
            raise EngineLost(f"a worker is lost: {error}") from error

    def end(self, *, kill: bool) -> None:
        """End every worker. Without `kill`, each may take a few seconds to finish its command."""
        for pipe in self._pipes:
            pipe.close()
        deadline = monotonic() + (0.0 if kill else _END_SECONDS)
        for process in self.processes:
            try:
                process.wait(timeout=max(deadline - monotonic(), 0))
            except subprocess.TimeoutExpired:
                if not kill:
                    logger.warning("worker pid %d does not end; killing it", process.pid)
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.wait(timeout=_END_SECONDS)
