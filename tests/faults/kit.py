"""Shared by the fault tests: nodes of real processes, ranks that stop where they are told, and checks for afterwards.

`Node` is one daemon with its engines; `Node.check()` is the end of every test: nothing torn serves, nothing is left,
and the next push reaches every engine bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator  # noqa: TC003 - dataclass fields
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch  # noqa: TC002 - dataclass methods
from safetensors.torch import load_file

from tests.faults.stopwatch import Stopwatch
from weightsync import push_weights
from weightsync.adapters.reference.config import ModelConfig
from weightsync.adapters.reference.model import greedy, load_checkpoint
from weightsync.adapters.reference.oracle import expected_checksums
from weightsync.errors import DaemonLost
from weightsync.fleet import Child, Daemon, Engine, Fleet  # noqa: TC001 - dataclass fields
from weightsync.operator import fetch_status
from weightsync.testing import eventually

__all__ = ["AT_ONCE", "TIMEOUTS", "TINY", "Node", "Rank", "engine_processes", "kill_tree", "segments", "until"]

TINY = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
TIMEOUTS = {"liveness": 3, "operation": 4, "grace": 2, "probe": 1, "probe_every": 0.5, "stop": 5, "bridge_start": 20}
AT_ONCE = 2.5  # seconds of a `Stopwatch`, on a busy machine: less than any timeout that must not be waited for
ARENA = {"slot_bytes": "64KiB", "slots": 2}  # eight buckets in two slots
PROMPT = [5, 17, 211, 3, 42]
TRAINER = Path(__file__).with_name("trainer.py")


def until(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    """Wait until a condition holds that other processes bring about."""
    assert eventually(condition, seconds=seconds), f"not within {seconds:g} s: {what}"


def segments(node: str) -> set[str]:
    """Return the names of a node's arenas in /dev/shm."""
    return {p.name for p in Path("/dev/shm").iterdir() if p.name.startswith(f"weightsync-{os.geteuid()}-{node}-")}


class Rank:
    """One trainer rank: a separate process, driven over a socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(40.0)
        self._socket.connect(str(path))
        self._line = self._socket.makefile("rw")
        self.pid: int = self._hear()["pid"]
        self.seconds = 0.0  # duration of its last failed push
        self._watch = Stopwatch()

    def push(self, **terms: Any) -> Rank:
        """Call push_weights; see `trainer.py` for the terms."""
        self._watch = Stopwatch()
        self._say(terms)
        return self

    def wait_at(self, where: str) -> None:
        """Return when the rank has stopped at its gate."""
        words = self._hear()
        assert words == {"at": where}, words

    def go(self) -> None:
        """Let it pass its gate."""
        self._say({})

    def result(self) -> dict[str, Any]:
        """Return the result of `push_weights`."""
        return self._hear()

    def error(self) -> dict[str, Any]:
        """Return the fields of the error that the rank raised, without None, and the push's seconds.

        Time in which the machine stood still is left out here, and included in `self.seconds`.
        """
        words = self._hear()
        assert "error" in words, words
        self.seconds = words["seconds"]
        seconds = self.seconds - self._watch.stood_still
        return {k: v for k, v in words["error"].items() if v is not None} | {"seconds": seconds}

    def report(self) -> dict[str, Any]:
        """Return the report that `push_weights` returned."""
        words = self._hear()
        assert "report" in words, words
        report: dict[str, Any] = words["report"]
        return report

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def close(self) -> None:
        """End the rank as a trainer ends."""
        self._line.close()
        self._socket.close()

    def _say(self, words: dict[str, Any]) -> None:
        self._line.write(json.dumps(words) + "\n")
        self._line.flush()

    def _hear(self) -> dict[str, Any]:
        text = self._line.readline()
        assert text, "the rank has ended"
        words: dict[str, Any] = json.loads(text)
        return words


def engine_processes(engine: Engine) -> list[psutil.Process]:
    """Return an engine's front and workers."""
    front = psutil.Process(engine.pid)
    return [front, *front.children(recursive=True)]


@dataclass
class Node:
    """A daemon, its engines and a trainer; `others` are the daemons it reaches."""

    fleet: Fleet
    daemon: Daemon
    engines: list[Engine]
    trainer: Child
    others: list[Daemon] = field(default_factory=list)
    versions: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    names: Iterator[str] = field(default_factory=lambda: itertools.cycle("AB"))
    ranks: list[Rank] = field(default_factory=list)
    fds: dict[int, int] = field(default_factory=dict)  # daemon pid → descriptors when first seen idle
    marks: dict[str, int] = field(default_factory=dict)  # daemon → length of its log when the test began
    before: str = ""  # the checkpoint that every engine holds since the last check; "" if that failed

    # --- acting ---------------------------------------------------------------------------------------------------

    def checkpoint(self, name: str) -> str:
        return str(self.fleet.root / name)

    def next_version(self) -> int:
        return next(self.versions)

    def start_ranks(self, count: int) -> list[Rank]:
        """Start trainer ranks; they have called nothing yet."""
        started = [Rank(self.fleet.root / "trainer.sock") for _ in range(count)]
        self.ranks += started
        return started

    def terms(self, rank: int, world: int, **more: Any) -> dict[str, Any]:
        """Return the terms of a push of checkpoint C, which no check ever pushes."""
        terms = {"endpoint": self.daemon.endpoint, "checkpoint": self.checkpoint("C"), "rank": rank, "world": world}
        return {**terms, **more}

    def push_all(self, ranks: list[Rank], version: int, **more: Any) -> None:
        """Have all ranks call. `more` may hold `only={rank: terms}`, for single ranks."""
        only: dict[int, dict[str, Any]] = more.pop("only", {})
        for number, rank in enumerate(ranks):
            rank.push(**self.terms(number, len(ranks), version=version, **{**more, **only.get(number, {})}))

    def push_once(self, ranks: list[Rank], **more: Any) -> None:
        """Have these ranks push the weights that engines hold already, before a push with a short timeout.

        The first push of a fresh rank may stand still for seconds while it loads libraries.
        """
        self.push_all(ranks, self.next_version(), checkpoint=self.checkpoint(self.before), **more)
        assert all(rank.report()["complete"] for rank in ranks)

    def status(self) -> Any:
        return fetch_status(self.daemon.endpoint)

    def push_state(self) -> str | None:
        push = self.status().push
        return None if push is None else str(push.state)

    def wait_state(self, state: str) -> None:
        until(lambda: self.push_state() == state, f"the push is {state}")

    def wait_waiting_for(self, words: str) -> None:
        """Return once status says that the push waits for something with these words."""
        until(lambda: words in getattr(self.status().push, "waiting_for", ""), f"the push waits for {words}")

    def wait_idle(self, seconds: float = 25.0) -> None:
        until(lambda: self.push_state() is None, "no push is under way", seconds)

    def wait_torn(self, engine: Engine) -> None:
        """Return once a push has touched the engine."""
        until(lambda: bool(self.info(engine)["torn"]), f"{engine.name} was touched")

    def wait_log(self, words: str, daemon: Daemon | None = None, *, since: int | None = None) -> None:
        """Return once the daemon has logged these words, since the test began or after so many characters."""
        log = (daemon or self.daemon).log
        begin = self.marks.get((daemon or self.daemon).name, 0) if since is None else since
        until(lambda: words in log.read_text()[begin:], f"{log.name} says {words!r}")

    def wait_attached(self) -> None:
        """Return once this daemon is connected to all its peers."""
        until(
            lambda: all(state == "connected" for state in self.status().peers.values()),
            "the daemons are connected",
        )

    def log_length(self, daemon: Daemon | None = None) -> int:
        return len((daemon or self.daemon).log.read_text())

    def engine_state(self, name: str) -> str:
        return next(str(e.state) for e in self.status().engines if e.name == name)

    def wait_engine_state(self, name: str, state: str) -> None:
        until(lambda: self.engine_state(name) == state, f"{name} is {state}")

    def info(self, engine: Engine) -> dict[str, Any]:
        shown: dict[str, Any] = self.get(engine, "/info")
        return shown

    def get(self, engine: Engine, path: str) -> Any:
        return httpx.get(f"{engine.url}{path}", timeout=20, trust_env=False).raise_for_status().json()

    def post(self, engine: Engine, path: str, body: dict[str, Any], seconds: float = 20.0) -> httpx.Response:
        headers = {"X-Timeout-Seconds": str(seconds)}
        return httpx.post(f"{engine.url}{path}", json=body, headers=headers, timeout=seconds + 20, trust_env=False)

    def order(self, engine: Engine, **fault: Any) -> None:
        """Order a fault of the engine; see `weightsync/adapters/reference/faults.py`."""
        self.post(engine, "/faults", fault).raise_for_status()

    def delay(self, engine: Engine, endpoint: str, *, after: int = 0, times: int = 1) -> None:
        """Have the engine hold a request back, until `clear`."""
        self.order(engine, delay={"endpoint": endpoint, "seconds": 60, "after": after, "times": times})

    def clear(self) -> None:
        """Clear every engine's faults. Requests that are held back go on."""
        for engine in self.engines:
            self.order(engine, clear=True)

    def bridge_pids(self, daemon: Daemon | None = None) -> list[int]:
        status = fetch_status((daemon or self.daemon).endpoint)
        return [b.pid for b in status.bridges if b.pid is not None]

    # --- what must hold -------------------------------------------------------------------------------------------

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return _weights(self.checkpoint(name))

    def serves(self, engine: Engine, name: str) -> None:
        """Assert that the engine generates with exactly these weights."""
        answer = self.post(engine, "/generate", {"prompt_ids": PROMPT, "max_tokens": 6}).raise_for_status().json()
        assert answer["token_ids"] == _tokens(self.checkpoint(name)), f"{engine.name} does not serve {name}"

    def wait_paused(self, engine: Engine) -> None:
        until(lambda: bool(self.info(engine)["paused"]), f"{engine.name} is paused")

    def wait_unpaused(self, engine: Engine) -> None:
        until(lambda: not self.info(engine)["paused"], f"{engine.name} serves")

    def wait_running(self, engine: Engine) -> None:
        until(lambda: self.info(engine)["running"] == 1, f"{engine.name} has a request in flight")

    def does_not_serve(self, engine: Engine) -> None:
        """Assert that the engine is torn, says so, is paused, and gives no token."""
        info = self.info(engine)
        assert info["torn"], f"{engine.name} does not know that it is torn: {info}"
        assert info["paused"], f"{engine.name} is torn and serves"
        answer = self.post(engine, "/generate", {"prompt_ids": PROMPT, "max_tokens": 1}, seconds=0.1)
        assert answer.status_code == 503, answer.text

    def torn_or_whole(self, name: str) -> set[str]:
        """Assert that no engine serves a mixture: each serves checkpoint `name` untouched, or is torn and paused.

        Returns the names of torn engines.
        """
        torn = set()
        for engine in self.engines:
            if self.info(engine)["torn"]:
                self.does_not_serve(engine)
                torn.add(engine.name)
            else:
                self.serves(engine, name)
        return torn

    def push(self, name: str, **options: Any) -> Any:
        """Push a checkpoint from this process."""
        version = self.next_version()
        options = {"timeout": 30, **options}
        return push_weights(self.weights(name), version=version, daemon=self.daemon.endpoint, **options)

    def check(self, **options: Any) -> str:
        """Push, and assert that every engine then holds and serves the weights. Returns the checkpoint's name."""
        for rank in self.ranks:
            rank.close()
        self.ranks.clear()
        self.before = ""
        with contextlib.suppress(DaemonLost):
            self.wait_idle()
            self.wait_attached()
        name = next(self.names)
        report = self.push(name, **options)
        self.holds(name, report)
        self.nothing_left()
        self.before = name
        self.marks = {daemon.name: self.log_length(daemon) for daemon in [self.daemon, *self.others]}
        return name

    def holds(self, name: str, report: Any) -> None:
        """Assert that every engine of the report was compared, holds these weights bit for bit, and serves them."""
        assert report.complete, str(report)
        weights = self.weights(name)
        assert {e.checked for e in report.engines} == {len(weights)}
        for engine in self.engines:
            assert self.get(engine, "/checksums") == _checksums(self.checkpoint(name), engine.tp), engine.name
            info = self.info(engine)
            assert (info["weight_version"], info["paused"], info["torn"]) == (report.version, False, False)
            self.serves(engine, name)

    def nothing_left(self) -> None:
        """Assert that a push has left no hold, arena, process or descriptor more than there must be."""
        self.wait_idle()
        for daemon in [self.daemon, *self.others]:
            problems = ""

            def is_tidy(daemon: Daemon = daemon) -> bool:
                nonlocal problems
                problems = self._tidy(daemon)
                return not problems

            assert eventually(is_tidy, seconds=10), f"{daemon.name}: {problems}"

    def _tidy(self, daemon: Daemon) -> str:
        """Return what the daemon has too much of, as text; "" if nothing."""
        status = fetch_status(daemon.endpoint)
        bridges = {b.pid for b in status.bridges}
        children = {c.pid for c in psutil.Process(daemon.pid).children(recursive=True)}
        problems = [f"bridge {b.index} has {b.outstanding} holds outstanding" for b in status.bridges if b.outstanding]
        if None in bridges or children != bridges:
            problems.append(f"its children are {children}, its bridges {bridges}")
        if len(segments(daemon.name)) != len(status.bridges):
            problems.append(f"its arenas are {segments(daemon.name)}")
        now = psutil.Process(daemon.pid).num_fds()
        before = self.fds.setdefault(daemon.pid, now)
        if now > before + 6:  # connections to engines and trainers come and go
            problems.append(f"it had {before} descriptors and now has {now}")
        return "; ".join(problems)

    # --- picking up the pieces ------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Have every process run again, whatever a test has left, so that the next test can begin."""
        for rank in self.ranks:
            with contextlib.suppress(OSError):
                rank.close()
        self.ranks.clear()
        for engine in self.engines:
            if engine.process.poll() is None:
                for process in engine_processes(engine):
                    process.resume()
            if not eventually(functools.partial(_healthy, engine), seconds=8):
                kill_tree(engine)
                self.fleet.restart_engine(engine)
        self.clear()
        for daemon in [*self.others, self.daemon]:
            with contextlib.suppress(ProcessLookupError):
                daemon.process.send_signal(signal.SIGCONT)
            if daemon.process.poll() is not None:
                self.fleet.restart_daemon(daemon)
        if self.others:
            self.fleet.wait_daemon(self.daemon, peers=len(self.others))


def _healthy(engine: Engine) -> bool:
    try:
        return httpx.get(f"{engine.url}/info", timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def kill_tree(engine: Engine) -> None:
    """Kill an engine with its workers, which may end by themselves meanwhile."""
    if engine.process.poll() is None:
        for process in reversed(engine_processes(engine)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    engine.process.wait(10)


@functools.cache
def _weights(checkpoint: str) -> dict[str, torch.Tensor]:
    return load_file(f"{checkpoint}/model.safetensors")


@functools.cache
def _tokens(checkpoint: str) -> list[int]:
    return greedy(load_checkpoint(checkpoint), PROMPT, 6)


@functools.cache
def _checksums(checkpoint: str, tp: int) -> list[str]:
    return expected_checksums(TINY, _weights(checkpoint), tp)
