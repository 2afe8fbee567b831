"""Which engine a test needs, and the one server and daemon that are up for it.

A server takes half a minute to start, so tests are put in order by what they need (`conftest.py`), and a server stays
up for as long as it serves them. There is one at a time: a machine with two cores and some gigabytes must do.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator  # noqa: TC003 - dataclass fields
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch  # noqa: TC002 - dataclass methods
from safetensors.torch import load_file

from tests.engines.kit import Oracle, RealEngine, Running, model, oracle
from weightsync import push_weights
from weightsync.fleet import Daemon, Fleet
from weightsync.operator import fetch_status
from weightsync.sources.checkpoint import CheckpointSource
from weightsync.testing import eventually
from weightsync.trainer.client import PushHandle, push_weights_async

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightsync.report import PushReport

__all__ = ["EXTENSION", "Need", "Node", "Part", "Yard", "segments"]

EXTENSION = "weightsync.adapters.vllm.extension.WeightSyncExtension"
_FLAGS = {
    "vllm": ("--weight-transfer-config", '{"backend": "weightsync"}', "--worker-extension-cls", EXTENSION),
    "sglang": (),
}
_STOCK = ("tensor", "ipc", "group")  # ways into an engine that knows nothing of weightsync
_SLOT = {True: "1MiB", False: "256KiB"}  # stock engines take tensors whole only; ours cut the embedding in two
_TIMEOUTS = {"operation": 60, "grace": 5, "probe": 10, "probe_every": 0.5, "liveness": 5}
_PUSH = 60.0  # seconds for one push of a tiny checkpoint on a loaded machine


@dataclass(frozen=True)
class Need:
    """An engine, what it was started on, and the way into it."""

    kind: str
    path: str
    checkpoint: str = "dense"  # pushed between: …_base, …_pert
    tp: int = 1
    dtype: str = "float32"
    fp8: bool = False  # it quantises when it starts

    @property
    def stock(self) -> bool:
        return self.path in _STOCK

    @property
    def bare(self) -> bool:
        """Whether its server does not see weightsync. With other models and sizes all ways share one that does."""
        return self.stock and (self.checkpoint, self.tp) == ("dense", 1)

    @property
    def server(self) -> tuple[Any, ...]:
        """Needs of which this is equal share a server."""
        return (self.kind, self.bare, self.checkpoint, self.tp, self.dtype, self.fp8)

    def __str__(self) -> str:
        shown = [self.kind, self.path, *([self.checkpoint] if self.checkpoint != "dense" else [])]
        return "-".join([*shown, *([f"tp{self.tp}"] if self.tp > 1 else [])])


@dataclass
class Node:
    """A daemon and its one engine."""

    need: Need
    fleet: Fleet
    daemon: Daemon
    engine: RealEngine
    versions: Iterator[int]
    oracles: dict[str, Oracle]

    # --- pushing --------------------------------------------------------------------------------------------------

    def folder(self, tag: str) -> Path:
        return model(f"{self.need.checkpoint}_{tag}")

    def weights(self, tag: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder(tag) / "model.safetensors")

    def push(self, weights: Any, **options: Any) -> PushReport:
        """Push a checkpoint (by its tag, "base" or "pert") or any source, and see that the engine has it."""
        report = self.try_push(weights, **options)
        assert report.complete, f"{report}\n{self.logs()}"
        return report

    def try_push(self, weights: Any, **options: Any) -> PushReport:
        """As `push`, whatever it comes to."""
        terms = {"version": next(self.versions), "daemon": self.daemon.endpoint, "timeout": _PUSH, **options}
        if not isinstance(weights, str):
            return push_weights(weights, **terms)
        with CheckpointSource(self.folder(weights)) as source:
            return push_weights(source, **terms)

    def start_push(self, source: Any, **options: Any) -> PushHandle:
        """A push in the background; the source must stay as it is."""
        terms = {"version": next(self.versions), "daemon": self.daemon.endpoint, "timeout": _PUSH, **options}
        return push_weights_async(source, **terms)

    # --- what must hold -------------------------------------------------------------------------------------------

    def check(self, tag: str) -> None:
        """The engine generates what this checkpoint generates."""
        self.oracles[tag].check(self.engine)

    def check_goes_on(self, request: Running) -> None:
        """The last tokens of a request are what the engine's present weights give after those before."""
        tokens = list(request.tokens)
        before, last = tokens[:-8], tuple(tokens[-8:])
        wanted = self.engine.generate([*request.prompt, *before], 8).tokens
        assert last == wanted, f"{last} instead of {wanted} after {len(before)} tokens: its old cache was used"

    def status(self) -> Any:
        return fetch_status(self.daemon.endpoint)

    def engine_status(self) -> Any:
        return self.status().engines[0]

    def wait_state(self, state: str, seconds: float = 30.0) -> None:
        """Return when the daemon sees the engine so."""
        assert eventually(lambda: self.engine_status().state == state, seconds=seconds), self.engine_status()

    def check_nothing_left(self) -> None:
        """No push is under way, every export was read and released, and nothing happened that nobody thought of."""
        assert eventually(lambda: self.status().push is None, seconds=30), self.status().push
        idle = eventually(lambda: not sum(b.outstanding for b in self.status().bridges), seconds=10)
        assert idle, f"exports are held: {self.status().bridges}"
        assert "Traceback" not in self.daemon.log.read_text(), self.logs()

    def logs(self) -> str:
        """The ends of both logs, for what a failed assertion shows."""
        child = self.engine.child
        return f"{self.daemon.tail(30)}\n{child.tail(40) if child is not None else 'the engine is gone'}"

    # --- breaking -------------------------------------------------------------------------------------------------

    def restart_engine(self) -> None:
        """Start the engine that was killed again, at the same address."""
        self.engine.start()
        self.wait_state("blank")


class Part:
    """A checkpoint that calls `then` at its last piece: with more buckets than slots, one is loaded by then."""

    def __init__(self, source: CheckpointSource, then: Callable[[], None]) -> None:
        self._source = source
        self._then = then
        self._left = source.nbytes

    @property
    def nbytes(self) -> int:
        return self._source.nbytes

    def layout(self) -> Any:
        return self._source.layout()

    def local(self, shard: int) -> torch.Tensor | None:
        return self._source.local(shard)

    def box_bytes(self, *box: Any) -> Any:
        return self._source.box_bytes(*box)

    def read_into(self, shard: int, src_offset: tuple[int, ...], shape: tuple[int, ...], out: torch.Tensor) -> None:
        self._left -= out.nbytes
        if not self._left:
            self._then()
        self._source.read_into(shard, src_offset, shape, out)


def segments(node: str) -> set[str]:
    """What a node has in /dev/shm."""
    return {p.name for p in Path("/dev/shm").iterdir() if p.name.startswith(f"weightsync-{os.geteuid()}-{node}-")}


@dataclass
class Yard:
    """The one engine server that is up in this test session, and the one daemon: two would undo each other's work."""

    root: Path
    engine: RealEngine | None = None
    fleet: Fleet | None = None
    present: Node | None = None
    _server: tuple[Any, ...] = ()
    _oracles: dict[str, Oracle] = field(default_factory=dict)
    _versions: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def node(self, need: Need) -> Node:
        """The node for a need; a server of another kind is ended first. Its engine is up and serves."""
        if self._server != need.server or self.engine is None or self.engine.child is None:
            self.close()
            self._start(need)
        if self.present is None or self.present.need != need:
            self._end_daemon()
            self.present = self._daemon(need)
        return self.present

    def _end_daemon(self) -> None:
        """End the daemon, and see that it leaves no shared memory."""
        if self.fleet is not None and self.present is not None:
            self.fleet.stop()
            left = segments(self.present.daemon.name)
            assert not left, f"left in shared memory: {left}"
        self.present = None

    def _start(self, need: Need) -> None:
        exact = need.dtype == "float32"
        wanted = {tag: oracle(f"{need.checkpoint}_{tag}") for tag in ("base", "pert")}
        self.engine = RealEngine(
            need.kind,
            model(f"{need.checkpoint}_{'base' if exact else 'pert'}"),
            self.root,
            name=f"{need.kind}{next(self._numbers)}",
            plugin=not need.bare,
            tp=need.tp,
            dtype=need.dtype,
            fp8=need.fp8,
            flags=() if need.bare else _FLAGS[need.kind],
        ).start()
        self._server, self._versions = need.server, itertools.count(1)
        if exact:
            wanted["base"].check(self.engine)
            self._oracles = wanted
        else:  # rounding differs between implementations: such an engine is its own oracle, as started
            self._oracles = {"pert": Oracle.record(self.engine, wanted["pert"])}

    def _daemon(self, need: Need) -> Node:
        assert self.engine is not None
        self.fleet = Fleet()
        name = f"engines{os.getpid()}-{need.path}"
        endpoint = f"ipc://{self.fleet.root / need.path}.sock"
        config = self.fleet.root / f"{need.path}.toml"
        tables: dict[str, dict[str, Any]] = {
            "node": {"name": name, "listen": endpoint},
            "arena": {"slots": 2, "slot_bytes": _SLOT[need.stock]},
            "timeouts": _TIMEOUTS,
        }
        lines = [
            line
            for table, values in tables.items()
            for line in (f"[{table}]", *(f"{key} = {_toml(value)}" for key, value in values.items()))
        ]
        lines += ["[[engines]]", 'name = "engine"', f'kind = "{need.kind}"', f'url = "{self.engine.url}"']
        lines += [f'path = "{need.path}"']
        config.write_text("\n".join(lines) + "\n")
        child = self.fleet.spawn(name, ("-m", "weightsyncd", "--node-config", str(config)))
        daemon = Daemon(name, child.process, child.log, endpoint=endpoint, config=config)
        self.fleet.children[-1] = daemon  # which knows its process, restarted or not
        self.fleet.wait_daemon(daemon, engines=1)
        return Node(need, self.fleet, daemon, self.engine, self._versions, self._oracles)

    def close(self) -> None:
        """End the daemon and the server."""
        try:
            self._end_daemon()
        finally:
            if self.engine is not None:
                self.engine.stop()
            self.engine = None
            self._server = ()


def _toml(value: Any) -> str:
    return str(value) if isinstance(value, int | float) else f'"{value}"'
