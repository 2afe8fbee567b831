"""For test_no_hang.py: two nodes and a trainer whose processes are hit in a push, and what must hold then.

On GPUs the nodes have one each and are joined by NCCL; on a CPU they are joined by gloo. A case is `reach`, `hit`,
`go_on`, `ended`, `check_engines`, `mend`, `push_again`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import torch

from tests.faults.kit import ARENA, TINY, TRAINER, Node, engine_processes, until
from tests.own import free_port, named
from weightsync.adapters.reference.checkpoint import random_checkpoint
from weightsync.adapters.reference.oracle import expected_checksums
from weightsync.fleet import Daemon, Engine, Fleet
from weightsync.operator import fetch_status, fetch_trace

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DEADLINE", "Nodes", "Victim", "two_nodes"]

DEADLINE = 20.0  # seconds that a push is given
LATE = 2.0  # … and that it may end after them
TIMEOUTS = {"liveness": 3, "operation": 5, "grace": 2, "probe": 1, "probe_every": 0.5, "stop": 5, "bridge_start": 30}
SLOW = json.dumps({"slow": 0.02})  # GPUs of engines dawdle, so that who is killed is killed with work on them


@dataclass(frozen=True)
class Victim:
    """Who is hit."""

    pid: int
    called: str  # how an error has to name it
    behind: frozenset[str]  # engines that may miss the push because of it
    must: bool  # … and do
    engine: Engine | None = None  # that it works for
    daemon: Daemon | None = None  # that it is, or that starts it again


@dataclass
class Nodes(Node):
    """As `Node`. `ranks` stay from case to case, like everything else that a case leaves alive."""

    gpu: int | None = None  # of the trainer
    group: str = "trainer"
    in_place: bool = False
    held: dict[str, str] = field(default_factory=dict)  # engine → checkpoint that it serves; none: not known
    stopped: list[int] = field(default_factory=list)  # bridges that stand still for a moment only
    gated: bool = False  # rank 1 stands at a gate
    version: int = 0  # that was pushed last
    good: bool = False  # a case has ended as it should

    # --- a push ---------------------------------------------------------------------------------------------------

    def start(self, gate: list[Any] | None = None) -> None:
        """Both ranks push checkpoint C, rank 1 up to a gate; returns once it stands there."""
        self.version = self.next_version()
        only = {1: {"gate": gate}} if gate is not None else {}
        self.push_all(self.ranks, self.version, only=only)
        if gate is not None:
            self.ranks[1].wait_at(gate[0])
            self.gated = gate[0] == "read" or self.gpu is None

    def terms(self, rank: int, world: int, **more: Any) -> dict[str, Any]:
        device = "cpu" if self.gpu is None else f"cuda:{self.gpu}"
        own = {"device": device, "group": self.group, "in_place": self.in_place, "timeout": DEADLINE}
        return super().terms(rank, world, **own | more)

    def reach(self, state: str, victim: Victim) -> None:
        """Bring a push to a state."""
        engine = victim.engine or self.engines[-1 if victim.daemon in self.others else 0]
        match state:
            case "filling":  # on a GPU: what has been asked of it is about to be written into a slot
                self.start(["fill", 6])
            case "on the wire":  # the bridge at home is in a broadcast, which the other's takes no part in
                self.start(["read", 6])
                until(lambda: self._under_way() == {"fill"}, "earlier buckets are loaded and given back")
                (away,) = self.bridge_pids(self.others[0])
                self.stopped.append(away)
                os.kill(away, signal.SIGSTOP)
                self.let_go()
                until(self._on_the_wire, "a bucket is on the wire, and nothing else goes on")
            case "loading":
                self.delay(engine, "/load", after=3)
                self.start()
                self.wait_waiting_for(f"{engine.name} (load, bucket 3)")
            case "finishing":
                self.delay(engine, "/finish")
                self.start()
                self.wait_waiting_for(f"{engine.name} (finish)")
            case "verifying":
                self.delay(engine, "/fingerprints")
                self.start()
                self.wait_waiting_for(f"{engine.name} (verify)")
            case "exposing":
                self.start(["read", 3])
            case "drawing":
                for one in self.engines:
                    self.delay(one, "/draw")
                self.start()
                for one in self.engines:
                    self.wait_waiting_for(f"{one.name} (draw)")

    def _on_the_wire(self) -> bool:
        return getattr(self.status().push, "waiting_for", "") == "the wire" and "wire" in self._under_way()

    def _under_way(self) -> set[str]:
        """The steps of the push that have begun and not ended."""
        spans = json.loads(fetch_trace(self.daemon.endpoint).document)["traceEvents"]
        return {span["cat"] for span in spans if "unfinished" in span["args"]}

    def let_go(self) -> None:
        """Rank 1 may pass its gate."""
        if self.gated:
            self.gated = False
            self.ranks[1].go()

    def hit(self, victim: Victim, by: str) -> None:
        os.kill(victim.pid, getattr(signal, by))
        if victim.pid in self.stopped:
            self.stopped.remove(victim.pid)

    def go_on(self, victim: Victim) -> None:
        """Whatever held the push at its state no longer does."""
        self.wake()
        if victim.pid != self.ranks[1].pid:
            self.let_go()
        self.clear()

    def wake(self) -> None:
        while self.stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.stopped.pop(), signal.SIGCONT)

    def clear(self) -> None:
        for engine in self.engines:
            with contextlib.suppress(httpx.HTTPError):  # of one that is killed
                self.order(engine, clear=True)

    # --- what must hold -------------------------------------------------------------------------------------------

    def ended(self, victim: Victim) -> dict[str, str]:
        """The push has ended in time for every rank that lives, and said who it was. The outcome of each engine, as
        far as it was told.
        """
        living = [rank for rank in self.ranks if rank.pid != victim.pid]
        every = [rank.result() for rank in living]
        for told in every:
            assert told.pop("seconds") < DEADLINE + LATE, told
            told.get("report", {}).pop("blocked_seconds", None)
            assert told == every[0], "every rank is told the same"
        if "error" in every[0]:
            error = every[0]["error"]
            assert error["kind"] in ("PushAborted", "PushTimeout"), error
            assert victim.called in f"{error['message']} (rank {error['rank']})", error
            assert not victim.must, f"others went on without: {error}"
            return {}
        engines = every[0]["report"]["engines"]
        missed = {e["engine"] for e in engines if e["outcome"] != "committed"}
        assert missed <= victim.behind, engines
        assert not victim.must or missed == victim.behind, engines
        assert all(e["error"] is not None for e in engines if e["engine"] in missed), engines
        return {e["engine"]: e["outcome"] for e in engines}

    def check_engines(self, outcomes: dict[str, str], but: Engine | None) -> None:
        """No engine, leaving out the one that was hit, serves anything but all of the new or all of the old."""
        self.wait_idle()
        for engine in self.engines:
            if engine is not but:
                self.whole(engine, outcomes.get(engine.name, ""))

    def whole(self, engine: Engine, outcome: str) -> None:
        info = self.info(engine)
        if info["torn"]:
            assert outcome != "committed", info
            self.does_not_serve(engine)
        elif outcome == "committed":
            assert info["weight_version"] == self.version
            self.serves(engine, "C")
        elif outcome == "lost":  # it, or who looks after it, did not answer: which of the two it has is not known
            new = info["weight_version"] == self.version
            assert self.get(engine, "/checksums") == self.checksums(engine, "C" if new else self.held[engine.name])
        else:
            self.serves(engine, self.held[engine.name])

    def serves(self, engine: Engine, name: str) -> None:
        """It has exactly these weights, and generates with them."""
        assert self.get(engine, "/checksums") == self.checksums(engine, name), f"{engine.name} does not hold {name}"
        answer = self.post(engine, "/generate", {"prompt_ids": [5, 17], "max_tokens": 2})
        assert answer.status_code == 200, answer.text

    def checksums(self, engine: Engine, name: str) -> list[str]:
        known = self.fleet.root / f"{name}.tp{engine.tp}.json"
        if not known.exists():
            known.write_text(json.dumps(expected_checksums(TINY, self.weights(name), engine.tp)))
        found: list[str] = json.loads(known.read_text())
        return found

    # --- afterwards -----------------------------------------------------------------------------------------------

    def mend(self, victim: Victim, by: str) -> None:
        """What an operator does: who stands still goes on, and who was killed is started, if nothing here does it."""
        killed = by == "SIGKILL"
        if not killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim.pid, signal.SIGCONT)
        if victim.engine is not None:
            if killed:
                victim.engine.process.wait(20)  # it ends without one of its workers
                self.fleet.restart_engine(victim.engine)
                self.held[victim.engine.name] = "A"
            else:
                self.whole(victim.engine, "lost")
        elif victim.daemon is not None and victim.daemon.pid == victim.pid:
            if killed:
                victim.daemon.process.wait(10)
                self.fleet.restart_daemon(victim.daemon)
        elif victim.daemon is not None:
            until(lambda: len(self.bridge_pids(victim.daemon)) == 1, "it has a bridge")
        else:
            self._mend_rank(killed=killed)

    def _mend_rank(self, *, killed: bool) -> None:
        if killed:
            self.ranks.pop().close()
            self.gated = False
            self.start_ranks(1)
        else:
            self.let_go()
            assert self.ranks[1].result(), "it hears how the push ended, late"

    def push_again(self) -> None:
        """The next push, by ranks that have lived through the last: all engines have it. And one more in place: an
        engine whose last draw went wrong is pushed to by slots first.
        """
        self.wait_idle()
        self.wait_attached()
        report = self._push_once()
        if self.in_place:
            report = self._push_once()
        assert {e["drawn"] for e in report["engines"]} == {self.in_place}, report["engines"]
        self.nothing_left()

    def _push_once(self) -> dict[str, Any]:
        if not self.ranks:
            self.start_ranks(2)
        name, version = next(self.names), self.next_version()
        self.push_all(self.ranks, version, checkpoint=self.checkpoint(name))
        reports = [rank.report() for rank in self.ranks]
        assert all(report["complete"] for report in reports), reports[0]
        assert {e["checked"] for e in reports[0]["engines"]} == {len(self.weights(name))}
        assert {e["engine"] for e in reports[0]["engines"]} == {e.name for e in self.engines}
        for engine in self.engines:
            info = self.info(engine)
            assert (info["weight_version"], info["paused"], info["torn"]) == (version, False, False)
            self.serves(engine, name)
            self.held[engine.name] = name
        return reports[0]

    @contextlib.contextmanager
    def logs(self) -> Iterator[None]:
        """With what goes wrong in here goes what the daemons have logged."""
        every = [self.daemon, *self.others, *self.engines, self.trainer]
        begin = {one.name: len(one.log.read_text()) for one in every}
        try:
            yield
        except BaseException as error:
            for one in every:
                error.add_note(f"log of {one.name}:\n{one.log.read_text()[begin[one.name] :][-8000:]}")
            raise

    def restore(self) -> None:
        """Of a case that has failed."""
        self.wake()
        for rank in self.ranks:
            with contextlib.suppress(ProcessLookupError):
                rank.kill(signal.SIGKILL)
        self.gated = False
        super().restore()

    def end_ranks(self) -> None:
        for rank in self.ranks:
            rank.close()
        self.ranks.clear()

    def alone(self) -> Nodes:
        """The other node by itself, which knows of no other: its engines, and a trainer there that pushes in place."""
        return Nodes(
            self.fleet,
            self.others[0],
            self.engines[1:],
            self.trainer,
            versions=self.versions,
            names=self.names,
            fds=self.fds,
            gpu=None if self.gpu is None else 1,
            group="alone",
            in_place=True,
            held=self.held,
        )

    # --- who is hit -----------------------------------------------------------------------------------------------

    def victim(self, name: str) -> Victim:
        """One of: rank, bridge at home, bridge away, daemon away, and worker of an engine."""
        home, away = self.daemon, self.others[0] if self.others else self.daemon
        elsewhere = frozenset(engine.name for engine in self.engines if self.others and engine is not self.engines[0])
        match name.split():
            case ["rank"]:
                return Victim(self.ranks[1].pid, "rank 1", frozenset(), must=False)
            case ["bridge", "home"]:
                return Victim(self.bridge_pids(home)[0], f"bridge {home.name}/0", frozenset(), must=False, daemon=home)
            case ["bridge", "away"]:
                return Victim(self.bridge_pids(away)[0], away.name, elsewhere, must=False, daemon=away)
            case ["daemon", "away"]:
                return Victim(away.pid, away.name, elsewhere, must=True, daemon=away)
            case ["worker", place]:
                engine = self.engines[0 if place == "home" else -1]
                return Victim(
                    engine_processes(engine)[-1].pid, engine.name, frozenset({engine.name}), must=True, engine=engine
                )
        raise AssertionError(name)


@contextlib.contextmanager
def two_nodes(device: str) -> Iterator[Nodes]:
    """The engine `home` where the trainer is; `away1` and `away2` reached through another daemon."""
    on_gpus = device == "cuda"
    with Fleet() as fleet:
        for seed, name in enumerate("ABC"):
            random_checkpoint(TINY, fleet.root / name, seed)
        engines = [
            fleet.start_engine(
                name,
                fleet.root / "A",
                tp=tp,
                device=device,
                port=free_port(),
                flags=["--enable-faults", *(["--trial", SLOW] if on_gpus and name != "away1" else [])],
                wait=False,
                env={"CUDA_VISIBLE_DEVICES": _uuid(gpu)} if on_gpus else {},
            )
            for name, tp, gpu in (("home", 1, 0), ("away1", 1, 1), ("away2", 2, 1))
        ]
        trainer = fleet.spawn("trainer", [str(TRAINER), str(fleet.root / "trainer.sock")])
        for engine in engines:
            fleet.wait_engine(engine)
        until((fleet.root / "trainer.sock").exists, "the trainer listens")
        away = _daemon(fleet, "hang2", engines[1:], 1, on_gpus, [])
        home = _daemon(fleet, "hang1", engines[:1], 0, on_gpus, [away])
        nodes = Nodes(fleet, home, engines, trainer, [away], gpu=0 if on_gpus else None)
        nodes.push_again()
        yield nodes
        nodes.end_ranks()
        for daemon in (home, away):
            words = daemon.log.read_text()
            assert "Traceback" not in words, words[words.index("Traceback") - 500 :]


def _uuid(gpu: int) -> str:
    return f"GPU-{torch.cuda.get_device_properties(gpu).uuid}"


def _daemon(fleet: Fleet, name: str, engines: list[Engine], gpu: int, on_gpus: bool, peers: list[Daemon]) -> Daemon:
    node = {"gpus": [_uuid(gpu)]} if on_gpus else {}
    log = {"level": "debug"}
    daemon = fleet.start_daemon(named(name), engines, peers=peers, node=node, arena=ARENA, timeouts=TIMEOUTS, log=log)
    assert fetch_status(daemon.endpoint).device == ("cuda" if on_gpus else "cpu")
    return daemon
