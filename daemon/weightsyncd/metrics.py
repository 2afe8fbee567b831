"""Prometheus metrics of a daemon. One registry for each daemon, so that several can live in one process in tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

if TYPE_CHECKING:
    from collections.abc import Iterable

    from weightsync.ipc.ledger import Account

__all__ = ["UNKNOWN", "Metrics"]

UNKNOWN = "unknown"  # the label of models that no engine serves, since callers may name any

_OUTCOMES = ("committed", "aborted", "torn")
_OF_ENGINES = ("committed", "skipped", "torn", "lost")
_FAILURES = ("PushRefused", "PushAborted", "PushTimeout")

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Every metric of weightsyncd. Names start with `weightsync_`."""

    def __init__(self, models: Iterable[str] = ()) -> None:
        """Pushes of `models` are counted from 0 on: see `expect`."""
        self.registry = CollectorRegistry()
        self.pushes = Counter(
            "weightsync_pushes", "Pushes by how they ended", ["model", "outcome"], registry=self.registry
        )
        self.push_failures = Counter(
            "weightsync_push_failures",
            "Calls of push_weights that came to nothing, by the error that was raised, whether there was a push or not",
            ["model", "kind"],
            registry=self.registry,
        )
        self.push_under_way = Gauge(
            "weightsync_push_under_way_seconds",
            "How long the push under way has lasted, coordinated here or elsewhere; 0 where this node is in none",
            registry=self.registry,
        )
        self.newest_version = Gauge(
            "weightsync_newest_version",
            "Newest version that pushes from this node have committed",
            ["model"],
            registry=self.registry,
        )
        self.engines_behind = Gauge(
            "weightsync_engines_behind",
            "Engines, of all nodes, that serve an older version than the newest that was pushed from this node",
            ["model"],
            registry=self.registry,
        )
        self.push_seconds = Histogram(
            "weightsync_push_seconds",
            "From the first rank's call to the last engine's resume",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.phase_seconds = Counter(
            "weightsync_phase_seconds", "Seconds with a phase under way", ["model", "phase"], registry=self.registry
        )
        self.push_bytes = Counter(
            "weightsync_push_bytes", "Bytes of committed pushes", ["model"], registry=self.registry
        )
        self.pushed: set[str] = set()  # engines that `engine_outcomes` shows
        self.engine_outcomes = Counter(
            "weightsync_engine_outcomes",
            "What pushes came to, by engine",
            ["engine", "outcome"],
            registry=self.registry,
        )
        self.engines: set[str] = set()  # engines that the next three gauges show
        self.engine_replayed = Gauge(
            "weightsync_engine_replayed_bytes",
            "Bytes of the last push that an engine's worker loaded without the engine's loader",
            ["engine"],
            registry=self.registry,
        )
        self.engine_version = Gauge(
            "weightsync_engine_version", "Version an engine serves; -1 for none", ["engine"], registry=self.registry
        )
        self.engine_state = Gauge(
            "weightsync_engine_state", "1 for the state an engine is in", ["engine", "state"], registry=self.registry
        )
        self.bridge_restarts = Gauge(
            "weightsync_bridge_restarts", "Times a bridge was restarted", ["bridge"], registry=self.registry
        )
        self.books: dict[str, tuple[Account, ...]] = {}  # accounts by bridge, as it last showed them
        self.readers: set[str] = set()  # readers that the next four gauges show
        self.exports = Gauge("weightsync_exports", "Exports so far, by reader", ["reader"], registry=self.registry)
        self.exports_outstanding = Gauge(
            "weightsync_exports_outstanding",
            "Exports that no reader has closed yet",
            ["reader"],
            registry=self.registry,
        )
        self.exports_opened = Gauge(
            "weightsync_exports_opened", "Exports that their reader has opened", ["reader"], registry=self.registry
        )
        self.exports_closed = Gauge(
            "weightsync_exports_closed", "Exports that their reader has given back", ["reader"], registry=self.registry
        )
        self.exports_leaked = Gauge(
            "weightsync_exports_leaked", "Exports revoked because a reader never closed them", registry=self.registry
        )
        self.slots = Gauge("weightsync_slots", "Slots of a bridge", ["bridge"], registry=self.registry)
        self.slots_taken = Gauge(
            "weightsync_slots_taken", "Slots of a bridge that hold a bucket", ["bridge"], registry=self.registry
        )
        self.shm_free = Gauge("weightsync_shm_free_bytes", "Free bytes of node.shm_dir", registry=self.registry)
        self.peers: set[str] = set()  # peers that `peer_connected` shows
        self.peer_connected = Gauge(
            "weightsync_peer_connected", "1 for a node that is reached, else 0", ["peer"], registry=self.registry
        )
        self.frames_refused = Counter(
            "weightsync_frames_refused", "Frames that were no message of ours", registry=self.registry
        )
        self.models: set[str] = set()  # models with counters that began at 0
        self.expect({*models, UNKNOWN}, ())

    def expect(self, models: Iterable[str], engines: Iterable[str]) -> None:
        """Begin the counters of these models and engines at 0.

        To Prometheus, a counter that begins at 1 has not risen: the first failure would raise no alert.
        """
        for model in set(models) - self.models:
            self.models.add(model)
            for outcome in _OUTCOMES if model != UNKNOWN else ():
                self.pushes.labels(model, outcome)
            for kind in _FAILURES:
                self.push_failures.labels(model, kind)
        for engine in set(engines) - self.pushed:
            self.pushed.add(engine)
            for outcome in _OF_ENGINES:
                self.engine_outcomes.labels(engine, outcome)

    def forget(self, engine: str) -> None:
        """Remove the counters of an engine's outcomes."""
        self.pushed.discard(engine)
        for outcome in _OF_ENGINES:
            self.engine_outcomes.remove(engine, outcome)
