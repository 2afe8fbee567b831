"""A daemon's sockets, for asyncio: `ControlServer` listens, `PeerLink` calls another daemon.

Both speak the messages of `wire.messages`, one frame each. An unreadable frame is answered or logged, and never ends
the loop that reads. Between machines both sides prove that they have the cluster's key (CURVE), and all traffic is
encrypted.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import zmq
import zmq.asyncio
import zmq.auth.asyncio
from zmq.utils.monitor import parse_monitor_message

from weightsync.errors import CodecError, ConfigError, DaemonError, DaemonLost
from weightsync.wire.codec import decode_untrusted, encode
from weightsync.wire.messages import ErrorReply, Message
from weightsync.wire.sockets import bounded, guarded, socket_path

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from weightsync.wire.keys import ClusterKey

__all__ = ["ControlServer", "PeerLink"]

logger = logging.getLogger(__name__)

_FAIR = 0.005  # seconds of reading frames before other tasks of the loop get a turn
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_WATCHED = _REFUSED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


class ControlServer:
    """The socket on which a daemon listens. A sender's opaque identity lasts as long as its connection."""

    def __init__(self, endpoint: str, name: str, *, key: ClusterKey | None = None, tag: bytes = b"here") -> None:
        """`name` is the endpoint's key in the config. With a `key`, only senders that have it too are heard.

        Identities begin with `tag`, which tells the senders of several servers apart.
        """
        self.endpoint = endpoint
        self._name = name
        self._key = key
        self._tag = tag
        self._authenticator: zmq.auth.asyncio.AsyncioAuthenticator | None = None
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        bounded(self._socket, endpoint)
        guarded(self._socket, key, listens=True)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)

    def bind(self) -> None:
        """Listen. An ipc socket's directory is made private to the user. Raises `ConfigError`."""
        path = socket_path(self.endpoint)
        if self._key is not None:
            self._authenticator = zmq.auth.asyncio.AsyncioAuthenticator(self._context)
            self._authenticator.start()
            self._authenticator.configure_curve_callback("*", _Holders(self._key))
        previous = os.umask(0o077)  # the socket file must never be open to others, not even for a moment
        try:
            if path:
                Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._socket.bind(self.endpoint)
        except (zmq.ZMQError, OSError) as error:
            raise ConfigError(f"cannot listen at {self.endpoint}: {error}", hint=f"key {self._name}") from error
        finally:
            os.umask(previous)

    def remove_stale(self) -> None:
        """Remove the socket file that a killed daemon left. Only the holder of the node's lock may call this."""
        path = socket_path(self.endpoint)
        if path and Path(path).is_socket():
            Path(path).unlink(missing_ok=True)

    async def frames(self, refused: Callable[[], None]) -> AsyncIterator[tuple[bytes, Message]]:
        """Yield every readable message with its sender. An unreadable frame is answered with its error and dropped."""
        since = time.monotonic()
        while True:
            if time.monotonic() - since > _FAIR:  # while messages are queued, the read below never yields to the loop
                await asyncio.sleep(0)
                since = time.monotonic()
            parts = await self._socket.recv_multipart()
            identity, frame = self._tag + parts[0], parts[-1]
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
        """Queue a message. Returns False if the receiver is gone or lags too far behind."""
        parts = [identity.removeprefix(self._tag), encode(message)]
        error = _refusal(self._socket.send_multipart(parts, flags=zmq.DONTWAIT))
        if error is not None:
            logger.debug("cannot send %s to %s: %s", type(message).__name__, identity.hex(), error)
        return error is None

    def close(self) -> None:
        """Stop listening and remove the socket's file."""
        if self._authenticator is not None:
            self._authenticator.stop()
        self._socket.close(linger=200)
        self._context.destroy(linger=200)
        self.remove_stale()


class _Holders:
    """Tells the authenticator which callers have the key."""

    def __init__(self, key: ClusterKey) -> None:
        self._key = key

    def callback(self, _domain: str, public: bytes) -> bool:
        """Whether the caller has this key. CURVE itself has checked that the caller has its secret half."""
        return public == self._key.public


def _complaint(error: CodecError) -> ErrorReply:
    return ErrorReply(error=error.record())


class PeerLink:
    """A daemon's line to another daemon: questions with ids, and answers.

    Once its connection has `broken` the link is of no use: ZeroMQ connects again, but the other daemon sends its
    answers to earlier questions to the old connection.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        patience: float,
        key: ClusterKey | None = None,
        on_news: Callable[[Message], None] | None = None,
    ) -> None:
        """`on_news` gets messages that answer no question. Raises `DaemonLost` if the endpoint is impossible."""
        self.endpoint = endpoint
        self._on_news = on_news
        self.patience = patience
        self.heard = time.monotonic()
        self.broken = asyncio.Event()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        bounded(self._socket, endpoint)
        guarded(self._socket, key, listens=False)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        monitor = self._socket.get_monitor_socket(_WATCHED)
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise DaemonLost(f"{endpoint} cannot be called: {error}") from error
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._refused = False  # whether a handshake was refused since the last message
        self._tasks = (
            asyncio.create_task(self._read(), name=f"peer {endpoint}"),
            asyncio.create_task(self._watch(monitor), name=f"connection to {endpoint}"),
        )

    async def ask(self, message: Message, *, deadline: float) -> Message:
        """Send a question and return its answer. Raises the error that it is answered with, or `DaemonLost`."""
        if self.broken.is_set():
            raise self._break()
        number = next(self._ids)
        waiting: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[number] = waiting
        try:
            self.tell(msgspec.structs.replace(message, id=number))
            async with asyncio.timeout_at(_loop_time(deadline)):
                answer = await waiting
        except TimeoutError as error:
            if self._refused:
                raise DaemonLost(
                    f"the daemon at {self.endpoint} does not have this node's key",
                    hint="the file of [cluster] key_file must be the same on every node",
                ) from error
            kind = type(message).__name__
            raise DaemonLost(f"the daemon at {self.endpoint} did not answer {kind} in time") from error
        finally:
            self._waiting.pop(number, None)
        if isinstance(answer, ErrorReply):
            raise answer.error.error()
        return answer

    def tell(self, message: Message) -> None:
        """Send a message that needs no answer."""
        if self.broken.is_set():
            return
        error = _refusal(self._socket.send(encode(message), flags=zmq.DONTWAIT))
        if error is not None:  # the queue is full, so the other daemon does not read; `silent` will notice
            logger.debug("cannot send %s to %s: %s", type(message).__name__, self.endpoint, error)

    @property
    def silent(self) -> bool:
        """Whether nothing was heard for `patience` seconds."""
        return time.monotonic() - self.heard > self.patience

    def fail(self, error: DaemonError) -> None:
        """Have all unanswered questions fail with `error`."""
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(error)

    async def close(self) -> None:
        """Close the line. Unanswered questions fail."""
        self.fail(DaemonError(f"the line to {self.endpoint} was closed"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._context.destroy(linger=0)

    async def _read(self) -> None:
        while True:
            frame = await self._socket.recv()
            self.heard, self._refused = time.monotonic(), False
            try:
                message = decode_untrusted(frame)
            except CodecError as error:
                logger.warning("the daemon at %s sent a frame that cannot be read: %s", self.endpoint, error)
                continue
            waiting = self._waiting.get(message.id)
            if waiting is not None and not waiting.done():
                waiting.set_result(message)
            elif message.id == 0 and self._on_news is not None:
                try:
                    self._on_news(message)
                except Exception:  # a bug in the callback must not end this loop, which would look like a dead line
                    logger.exception("%s from %s failed", type(message).__name__, self.endpoint)

    async def _watch(self, monitor: zmq.asyncio.Socket) -> None:
        """Note handshakes that are refused. Break the link when its first established connection ends."""
        connected = False
        while True:
            event = parse_monitor_message(await monitor.recv_multipart())["event"]
            if event & _REFUSED:
                self._refused = True
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                connected = True
            elif connected:
                break
        while int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:  # noqa: ASYNC110 - `_read` reads its last words before
            await asyncio.sleep(0)
        self.broken.set()
        self.fail(self._break())

    def _break(self) -> DaemonLost:
        return DaemonLost(f"the connection to the daemon at {self.endpoint} broke")


def _refusal(sent: Awaitable[object]) -> BaseException | None:
    """Return why a send with DONTWAIT failed, or None. pyzmq resolves such a send before it returns."""
    return sent.exception() if isinstance(sent, asyncio.Future) and sent.done() else None


def _loop_time(deadline: float) -> float:
    """Convert a deadline of `time.monotonic()` to the running loop's clock."""
    return asyncio.get_running_loop().time() + (deadline - time.monotonic())
