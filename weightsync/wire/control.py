"""The control plane's sockets. The only module that knows ZeroMQ.

`TrainerLink` is a trainer rank's side: a thread owns the socket, so that heartbeats go on while the caller copies
weights. `ControlServer` is the daemon's listening side and `PeerLink` its calling side, both for asyncio. All speak
the messages of `wire.messages`, one frame each; a frame that cannot be read is answered or reported, never raised
into a loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import queue
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec
import zmq
import zmq.asyncio

from weightsync.config import check_endpoint
from weightsync.errors import CodecError, ConfigError, DaemonError, DaemonLost
from weightsync.wire.codec import MAX_FRAME, decode_untrusted, encode
from weightsync.wire.messages import ErrorReply, Heartbeat, Message

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

__all__ = ["ControlServer", "PeerLink", "TrainerLink", "socket_path"]

logger = logging.getLogger(__name__)

_QUEUE = 10_000  # messages a peer may lag behind before it is dropped
_KNOCK = 1.0  # seconds for a listening daemon's kernel to say that it is there
_FAIR = 0.005  # seconds of reading frames before others on the loop have their turn


def socket_path(endpoint: str) -> str:
    """The file of an ipc endpoint, or "" for others."""
    return endpoint.removeprefix("ipc://") if endpoint.startswith("ipc://") else ""


def _options(line: zmq.Socket[bytes] | zmq.asyncio.Socket) -> None:
    line.setsockopt(zmq.LINGER, 0)
    line.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
    line.setsockopt(zmq.SNDHWM, _QUEUE)
    line.setsockopt(zmq.RCVHWM, _QUEUE)


# --- a trainer rank ------------------------------------------------------------------------------------------------


class TrainerLink:
    """One rank's line to its daemon, for one push after another; not for two at a time.

    `send` never blocks. Between `start` and `rest`, `receive` raises `DaemonLost` as soon as the daemon hangs up, and
    when it has been silent for `patience` seconds; an idle link costs nothing and says nothing.
    """

    def __init__(self, endpoint: str, *, patience: float = 10.0) -> None:
        check_endpoint(endpoint, "daemon")
        self.endpoint = endpoint
        self.patience = patience
        self._context = zmq.Context()
        self._wake = self._context.socket(zmq.PAIR)
        self._wake.setsockopt(zmq.LINGER, 0)
        self._address = f"inproc://link-{id(self)}"
        self._wake.bind(self._address)
        self._lock = threading.Lock()
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[Message | Exception] = queue.SimpleQueue()
        self._listening = False
        self._interval = 0.5
        self._flush = 0.0
        self._thread = threading.Thread(target=self._run, name="weightsync-link", daemon=True)
        self._thread.start()

    def start(self) -> None:
        """Expect the daemon from now on. Raises `DaemonLost` at once where no daemon listens."""
        problem = _nobody_at(self.endpoint)
        if problem is not None:
            raise DaemonLost(
                f"no weightsyncd listens at {self.endpoint} ({problem})",
                hint="start one with: weightsyncd --node-config node.toml; or set WEIGHTSYNC_DAEMON to its endpoint",
            )
        while not self._inbox.empty():
            self._inbox.get_nowait()
        self._listening = True
        self._rouse()

    def rest(self) -> None:
        """The push is over: no more heartbeats, and silence is fine."""
        self._listening = False

    def set_heartbeat(self, seconds: float) -> None:
        """How often to be heard."""
        self._interval = min(max(seconds, 0.01), self.patience / 3)

    def send(self, message: Message) -> None:
        """Queue a message; from any thread."""
        self._outbox.put(encode(message))
        self._rouse()

    def receive(self, deadline: float) -> Message | None:
        """The next message, or None when the deadline passes first. Raises `DaemonLost` or `CodecError`."""
        try:
            got = self._inbox.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return None
        if isinstance(got, Exception):
            raise got
        return got

    def close(self, *, flush: float = 1.0) -> None:
        """End the thread and the socket; what is queued has `flush` seconds to leave. Closing twice does nothing."""
        if self._context.closed:
            return
        self._flush = flush
        self._outbox.put(None)
        self._rouse()
        self._thread.join(timeout=5.0 + flush)
        self._wake.close()
        if self._thread.is_alive():  # `term` would wait for it without end
            logger.warning("the line to weightsyncd at %s does not close", self.endpoint)
        else:
            self._context.term()

    def _rouse(self) -> None:
        with self._lock, contextlib.suppress(zmq.ZMQError):  # the thread is gone: nobody to rouse
            self._wake.send(b"", zmq.DONTWAIT)

    def _run(self) -> None:
        wake = self._context.socket(zmq.PAIR)
        wake.setsockopt(zmq.LINGER, 0)
        wake.connect(self._address)
        line = self._context.socket(zmq.DEALER)
        _options(line)
        line.setsockopt(zmq.RECONNECT_IVL, 50)
        hung_up = line.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        line.connect(self.endpoint)
        try:
            self._loop(line, wake, hung_up)
        finally:
            line.disable_monitor()
            hung_up.close(linger=0)
            line.close(linger=int(self._flush * 1000))
            wake.close()

    def _loop(self, line: zmq.Socket[bytes], wake: zmq.Socket[bytes], hung_up: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        for one in (line, wake, hung_up):
            poller.register(one, zmq.POLLIN)
        heard = said = time.monotonic()
        was_listening = gone = False
        beat = encode(Heartbeat())
        while True:
            now = time.monotonic()
            if self._listening and not was_listening:
                heard = said = now
                _drain(hung_up)  # it may have restarted while nobody listened
                gone = False
            was_listening = self._listening
            gone = _drain(hung_up) or gone
            if was_listening and ((gone and not line.poll(0)) or now - heard > self.patience):
                self._listening = was_listening = False
                how = "hung up" if gone else f"has not been heard for {self.patience:g} s"
                self._inbox.put(
                    DaemonLost(
                        f"weightsyncd at {self.endpoint} {how}",
                        hint="look at its log; weightsync status shows whether it runs",
                    )
                )
            if was_listening and now - said >= self._interval:
                with contextlib.suppress(zmq.Again):  # it does not read: its silence will tell
                    line.send(beat, zmq.DONTWAIT)
                said = now
            due = min(said + self._interval, heard + self.patience) - now if was_listening else 60.0
            if was_listening and gone:
                due = 0.0  # once its last words are read
            while not self._outbox.empty():  # before waiting: who filled it may have called before anyone could hear
                frame = self._outbox.get()
                if frame is None:
                    return
                try:
                    line.send(frame, zmq.DONTWAIT)
                except zmq.Again:
                    self._inbox.put(DaemonLost(f"weightsyncd at {self.endpoint} takes no more messages"))
            poller.poll(max(1, int(due * 1000)))
            while wake.poll(0):
                wake.recv()
            while line.poll(0):
                heard = time.monotonic()
                try:
                    message = decode_untrusted(line.recv())
                except CodecError as error:
                    self._inbox.put(error)
                    continue
                if not isinstance(message, Heartbeat):
                    self._inbox.put(message)


def _drain(monitor: zmq.Socket[bytes]) -> bool:
    """Whether the monitor has reported anything."""
    reported = False
    while monitor.poll(0):
        monitor.recv_multipart()
        reported = True
    return reported


def _nobody_at(endpoint: str) -> str | None:
    """Why nobody listens at the endpoint, if so. ZeroMQ itself would try again for ever without a word."""
    path = socket_path(endpoint)
    try:
        if path:
            if os.stat(path).st_uid != os.geteuid():  # in a directory that others may write to
                return "the socket there belongs to another user"
            with socket.socket(socket.AF_UNIX) as knock:
                knock.settimeout(_KNOCK)
                knock.connect(path)
        else:
            parts = urlsplit(endpoint)
            socket.create_connection((parts.hostname or "", parts.port or 0), timeout=_KNOCK).close()
    except (TimeoutError, BlockingIOError):
        return None  # somebody does, and is busy
    except OSError as error:
        return error.strerror or str(error)
    return None


# --- a daemon ------------------------------------------------------------------------------------------------------


class ControlServer:
    """Where a daemon listens. Senders are known by an opaque identity that lasts as long as their connection."""

    def __init__(self, endpoint: str) -> None:
        check_endpoint(endpoint, "node.listen")
        self.endpoint = endpoint
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        _options(self._socket)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)

    def bind(self) -> None:
        """Listen. An ipc socket's directory is made private to the user. Raises `ConfigError`."""
        path = socket_path(self.endpoint)
        previous = os.umask(0o077)  # the socket file must not be open to others for a moment either
        try:
            if path:
                Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._socket.bind(self.endpoint)
        except (zmq.ZMQError, OSError) as error:
            raise ConfigError(f"cannot listen at {self.endpoint}: {error}", hint="key node.listen") from error
        finally:
            os.umask(previous)

    def remove_stale(self) -> None:
        """Remove the socket file that a killed daemon left. Only for the holder of the node's lock."""
        path = socket_path(self.endpoint)
        if path and Path(path).is_socket():
            Path(path).unlink(missing_ok=True)

    async def frames(self, refused: Callable[[], None]) -> AsyncIterator[tuple[bytes, Message]]:
        """Every readable message with its sender; an unreadable frame is answered with its error and dropped."""
        since = time.monotonic()
        while True:
            if time.monotonic() - since > _FAIR:  # a full socket never makes this coroutine wait
                await asyncio.sleep(0)
                since = time.monotonic()
            parts = await self._socket.recv_multipart()
            identity, frame = parts[0], parts[-1]
            if len(parts) != 2:
                refused()
                self.send(identity, _complaint(CodecError(f"a message has one frame, not {len(parts) - 1}")))
                continue
            try:
                message = decode_untrusted(frame)
            except CodecError as error:
                refused()
                self.send(identity, _complaint(error))
                continue
            yield identity, message

    def send(self, identity: bytes, message: Message) -> bool:
        """Queue a message; False when the receiver is gone or lags too far behind."""
        error = _refusal(self._socket.send_multipart([identity, encode(message)], flags=zmq.DONTWAIT))
        if error is not None:
            logger.debug("cannot send %s to %s: %s", type(message).__name__, identity.hex(), error)
        return error is None

    def close(self) -> None:
        """Stop listening and remove the socket's file."""
        self._socket.close(linger=200)
        self._context.destroy(linger=200)
        self.remove_stale()


def _complaint(error: CodecError) -> ErrorReply:
    return ErrorReply(error=error.record())


class PeerLink:
    """A daemon's line to another daemon: questions with ids, and answers; `lost` is set once it falls silent."""

    def __init__(self, endpoint: str, *, patience: float) -> None:
        check_endpoint(endpoint, "cluster.peers")
        self.endpoint = endpoint
        self.patience = patience
        self.heard = time.monotonic()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        _options(self._socket)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.connect(endpoint)
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._reader = asyncio.create_task(self._read(), name=f"peer {endpoint}")

    async def ask(self, message: Message, *, deadline: float) -> Message:
        """Send a question and wait for its answer. Raises the error it is answered with, or `DaemonLost`."""
        number = next(self._ids)
        waiting: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[number] = waiting
        try:
            self.tell(msgspec.structs.replace(message, id=number))
            async with asyncio.timeout_at(_loop_time(deadline)):
                answer = await waiting
        except TimeoutError as error:
            kind = type(message).__name__
            raise DaemonLost(f"the daemon at {self.endpoint} did not answer {kind} in time") from error
        finally:
            self._waiting.pop(number, None)
        if isinstance(answer, ErrorReply):
            raise answer.error.error()
        return answer

    def tell(self, message: Message) -> None:
        """Send a message that needs no answer."""
        error = _refusal(self._socket.send(encode(message), flags=zmq.DONTWAIT))
        if error is not None:  # a full queue: it is not reading, and `silent` will tell
            logger.debug("cannot send %s to %s: %s", type(message).__name__, self.endpoint, error)

    def beat(self) -> None:
        """Say that this side is alive; the other answers in kind."""
        self.tell(Heartbeat())

    @property
    def silent(self) -> bool:
        """Nothing was heard for `patience` seconds."""
        return time.monotonic() - self.heard > self.patience

    def fail(self, error: DaemonError) -> None:
        """Everything asked and not answered yet fails with `error`."""
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(error)

    async def close(self) -> None:
        """Let go of the line; what is unanswered fails."""
        self.fail(DaemonError(f"the line to {self.endpoint} was closed"))
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        self._context.destroy(linger=0)

    async def _read(self) -> None:
        while True:
            frame = await self._socket.recv()
            self.heard = time.monotonic()
            try:
                message = decode_untrusted(frame)
            except CodecError as error:
                logger.warning("the daemon at %s sent a frame that cannot be read: %s", self.endpoint, error)
                continue
            waiting = self._waiting.get(message.id)
            if waiting is not None and not waiting.done():
                waiting.set_result(message)


def _refusal(sent: Awaitable[object]) -> BaseException | None:
    """Why a send with DONTWAIT failed. pyzmq resolves such a send before it returns."""
    return sent.exception() if isinstance(sent, asyncio.Future) and sent.done() else None


def _loop_time(deadline: float) -> float:
    """A deadline of `time.monotonic()` on the running loop's clock."""
    return asyncio.get_running_loop().time() + (deadline - time.monotonic())
