"""Measures a daemon for its metrics, and serves the pages /metrics and /healthz."""

from __future__ import annotations

import contextlib
import itertools
import logging
import shutil
import sys
import threading
import time
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

from weightsync.errors import ConfigError
from weightsyncd.status import accounts_of, slots_taken

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weightsync.session.machine import PushSession
    from weightsync.wire import messages as msg
    from weightsyncd.metrics import Metrics
    from weightsyncd.server import Server

__all__ = ["HealthPage", "measure_node", "measure_push"]

logger = logging.getLogger(__name__)

_STATES = ("serving", "paused", "asleep", "torn", "blank", "lost", "unknown")


def measure_push(metrics: Metrics, session: PushSession, outcome: msg.PushOutcome | None, *, repeat: bool) -> None:
    """Count a push that has ended. If a keeper's `repeat` fails, that is no failure of `push_weights`."""
    metrics.pushes.labels(session.model, str(session.state)).inc()
    if session.error is not None and not repeat:
        metrics.push_failures.labels(session.model, session.error.kind).inc()
    if outcome is None:
        return
    metrics.expect((), [engine.engine for engine in outcome.engines])
    for engine in outcome.engines:
        metrics.engine_outcomes.labels(engine.engine, engine.outcome).inc()
    for phase, seconds in outcome.phases.items():
        metrics.phase_seconds.labels(session.model, phase).inc(seconds)
    if session.committed:
        metrics.push_seconds.labels(session.model).observe(outcome.seconds)
        metrics.push_bytes.labels(session.model).inc(outcome.nbytes)


async def measure_node(server: Server) -> None:
    """Bring the gauges up to date."""
    metrics = server.metrics
    names = {engine.name for engine in server.engines}
    for gone in metrics.engines - names:
        metrics.engine_version.remove(gone)
        metrics.engine_replayed.remove(gone)
        for state in _STATES:
            metrics.engine_state.remove(gone, state)
    metrics.engines = names
    everywhere = [e.status(server.config.node.name) for e in server.engines]
    everywhere += [e for peer in server.peers.values() for e in peer.engines]
    for gone in metrics.pushed - {e.name for e in everywhere}:
        if gone not in server.engines:  # keepers are in there, too
            metrics.forget(gone)
    taking = [e for e in everywhere if not e.frozen]
    metrics.expect({e.model for e in taking}, {e.name for e in taking})
    for engine in server.engines:
        version = engine.info.version if engine.info is not None else None
        metrics.engine_version.labels(engine.name).set(-1 if version is None else version)
        replay = engine.info.replay if engine.info is not None else None
        replayed = replay.replayed_bytes if replay is not None and replay.phase == "replay" else 0
        metrics.engine_replayed.labels(engine.name).set(replayed)
        for state in _STATES:
            metrics.engine_state.labels(engine.name, state).set(engine.state == state)
    metrics.exports_leaked.set(server.executor.exports.leaks)
    _measure_pushes(server, everywhere)
    for gone in metrics.peers - server.peers.keys():
        metrics.peer_connected.remove(gone)
    metrics.peers = set(server.peers)
    for name, peer in server.peers.items():
        metrics.peer_connected.labels(name).set(peer.info is not None)
    with contextlib.suppress(OSError):
        metrics.shm_free.set(shutil.disk_usage(server.config.node.shm_dir).free)
    for bridge in server.bridges:
        metrics.bridge_restarts.labels(bridge.name).set(bridge.restarts)
        metrics.slots.labels(bridge.name).set(server.config.arena.slots)
        metrics.slots_taken.labels(bridge.name).set(slots_taken(server, bridge.config.index))
        accounts = await accounts_of(bridge, server.config.timeouts.operation)
        if accounts is not None:  # else the last ones it showed stay
            metrics.books[bridge.name] = accounts
    _measure_readers(metrics)


def _measure_readers(metrics: Metrics) -> None:
    """Show each reader's accounts, summed over bridges. A reader unknown to all is gone, or its bridge was replaced."""
    books: dict[str, list[int]] = {}
    for account in itertools.chain(*metrics.books.values()):
        counts = books.setdefault(account.reader, [0, 0, 0, 0])
        each = (account.exports, account.opens, account.closes, account.outstanding)
        counts[:] = [total + count for total, count in zip(counts, each, strict=True)]
    shown = (metrics.exports, metrics.exports_opened, metrics.exports_closed, metrics.exports_outstanding)
    for gauge, gone in itertools.product(shown, metrics.readers - books.keys()):
        gauge.remove(gone)
    metrics.readers = set(books)
    for reader, counts in books.items():
        for gauge, count in zip(shown, counts, strict=True):
            gauge.labels(reader).set(count)


def _measure_pushes(server: Server, engines: Sequence[msg.EngineStatus]) -> None:
    metrics, push, followed = server.metrics, server.trainers.push, server.follower.context
    since = [push.session.started] if push is not None else [followed.since] if followed is not None else []
    metrics.push_under_way.set(time.monotonic() - since[0] if since else 0)
    for model, newest in server.trainers.newest.items():
        metrics.newest_version.labels(model).set(newest)
        serving = [-1 if e.version is None else e.version for e in engines if e.model == model and not e.frozen]
        metrics.engines_behind.labels(model).set(sum(version < newest for version in serving))


class HealthPage:
    """Serves /metrics for Prometheus, and /healthz for checks whether the daemon lives; loopback only."""

    def __init__(self, listen: str, metrics: Metrics) -> None:
        host, _, port = listen.rpartition(":")
        pages = make_wsgi_app(metrics.registry)

        def app(environ: dict[str, Any], start: Callable[..., Any]) -> list[bytes]:
            if environ.get("PATH_INFO") == "/healthz":
                start("200 OK", [("Content-Type", "text/plain")])
                return [b"ok\n"]
            if environ.get("PATH_INFO") == "/metrics":
                return list(pages(environ, start))
            start("404 Not Found", [("Content-Type", "text/plain")])
            return [b"/metrics or /healthz\n"]

        try:
            self._server = make_server(host.strip("[]"), int(port), app, _Pages, _Quiet)
        except OSError as error:
            raise ConfigError(f"http.listen = {listen!r}: {error.strerror}", hint="choose a free port") from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)

    def serve(self) -> None:
        """Answer requests, in another thread."""
        self._thread.start()
        logger.info("metrics at http://%s:%d/metrics", *self._server.server_address[:2])

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._thread.join(timeout=5.0)
        self._server.server_close()


class _Pages(ThreadingMixIn, WSGIServer):
    """A thread for each connection: a client that connects and sends nothing holds up neither others nor `close`."""

    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("connection from %s failed: %r", client_address, sys.exception())


class _Quiet(WSGIRequestHandler):
    timeout = 10.0  # seconds for a request to arrive

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)
