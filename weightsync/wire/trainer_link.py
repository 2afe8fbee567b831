"""A trainer rank's line to its daemon.

A thread owns the socket, so that heartbeats go on while the caller copies weights.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import threading
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import zmq

from weightsync.endpoints import check_endpoint
from weightsync.errors import CodecError, DaemonLost
from weightsync.wire.codec import decode_untrusted, encode
from weightsync.wire.inbox import Inbox
from weightsync.wire.messages import Heartbeat
from weightsync.wire.sockets import bounded, guarded, socket_path

if TYPE_CHECKING:
    from weightsync.wire.keys import ClusterKey
    from weightsync.wire.messages import Message

__all__ = ["TrainerLink"]

logger = logging.getLogger(__name__)

_KNOCK = 1.0  # seconds to connect; the kernel accepts for a listening daemon, even a busy one


class TrainerLink:
    """One rank's line to its daemon, for one push at a time.

    `send` never blocks. Between `start` and `rest`, `receive` raises `DaemonLost` as soon as the daemon hangs up, or
    when it has been silent for `patience` seconds. An idle link costs nothing and sends nothing.
    """

    def __init__(self, endpoint: str, *, patience: float = 10.0, key: ClusterKey | None = None) -> None:
        """`key` is for a daemon on another node, which answers only operators over such a line."""
        check_endpoint(endpoint, "daemon", keys=key is not None)
        self._key = key
        self.endpoint = endpoint
        self.patience = patience
        self._context = zmq.Context()
        self._wake, roused = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
        for end in (self._wake, roused):
            end.setsockopt(zmq.LINGER, 0)
        roused.bind(address := f"inproc://link-{id(self)}")
        self._wake.connect(address)  # the end that connects can send at once
        self._lock = threading.Lock()
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._inbox: Inbox[Message | Exception] = Inbox()
        self._listening = False
        self._interval = 0.5
        self._flush = 0.0
        self._thread = threading.Thread(target=self._run, args=(roused,), name="weightsync-link", daemon=True)
        self._thread.start()

    def start(self) -> None:
        """Begin to send heartbeats and to expect the daemon's. Raises `DaemonLost` at once if no daemon listens."""
        problem = _nobody_at(self.endpoint)
        if problem is not None:
            raise DaemonLost(
                f"no weightsyncd listens at {self.endpoint} ({problem})",
                hint="start one with: weightsyncd --node-config node.toml; or set WEIGHTSYNC_DAEMON to its endpoint",
            )
        self._inbox.clear()
        self._listening = True
        self._rouse()

    def rest(self) -> None:
        """End a push: send no more heartbeats, and tolerate silence."""
        self._listening = False

    def set_heartbeat(self, seconds: float) -> None:
        """Set the interval of heartbeats, at most a third of `patience`."""
        self._interval = min(max(seconds, 0.01), self.patience / 3)

    def send(self, message: Message) -> None:
        """Queue a message; from any thread."""
        self._outbox.put(encode(message))
        self._rouse()

    def announce(self, model: str) -> None:
        """Tell the daemon, if one listens, that a push to this model is coming. Waits for no answer."""
        if _nobody_at(self.endpoint) is None:
            self.send(Heartbeat(coming=model))

    def receive(self, deadline: float) -> Message | None:
        """Return the next message, or None at the deadline. Raises `DaemonLost` or `CodecError`."""
        got = self._inbox.get(deadline)
        if isinstance(got, Exception):
            raise got
        return got

    def close(self, *, flush: float = 1.0) -> None:
        """End the thread and the socket. Queued messages have `flush` seconds to leave. Closing twice does nothing."""
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
        with self._lock, contextlib.suppress(zmq.ZMQError):  # an error means that the thread has ended
            self._wake.send(b"", zmq.DONTWAIT)

    def _run(self, wake: zmq.Socket[bytes]) -> None:
        line = self._context.socket(zmq.DEALER)
        bounded(line, self.endpoint)
        guarded(line, self._key, listens=False)
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
                _drained(hung_up)  # the daemon may have restarted between pushes
                gone = False
            was_listening = self._listening
            gone = _drained(hung_up) or gone
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
                with contextlib.suppress(zmq.Again):  # the daemon does not read; `patience` will notice
                    line.send(beat, zmq.DONTWAIT)
                said = now
            due = min(said + self._interval, heard + self.patience) - now if was_listening else 60.0
            if was_listening and gone:
                due = 0.0  # only its last messages are still to be read
            while not self._outbox.empty():  # before the poll: a wake-up may have been sent before it could be heard
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


def _drained(monitor: zmq.Socket[bytes]) -> bool:
    """Whether the monitor has reported anything."""
    reported = False
    while monitor.poll(0):
        monitor.recv_multipart()
        reported = True
    return reported


def _nobody_at(endpoint: str) -> str | None:
    """Return why nobody listens at the endpoint, or None. ZeroMQ itself would retry for ever without a word."""
    path = socket_path(endpoint)
    try:
        if path:
            if os.stat(path).st_uid != os.geteuid():  # possible if others may write to its directory
                return "the socket there belongs to another user"
            with socket.socket(socket.AF_UNIX) as knock:
                knock.settimeout(_KNOCK)
                knock.connect(path)
        else:
            parts = urlsplit(endpoint)
            socket.create_connection((parts.hostname or "", parts.port or 0), timeout=_KNOCK).close()
    except (TimeoutError, BlockingIOError):
        return None  # a busy daemon listens
    except OSError as error:
        return error.strerror or str(error)
    return None
