"""gpu_proof.py: push into real vLLM and SGLang servers on this machine's GPUs, and compare what they generate.

    python -m engines.gpu_proof --models DIR --vllm vllm --sglang "python -m sglang.launch_server" --json proof.json

DIR holds pairs of checkpoints NAME-base and NAME-new of one shape. For every case (engine, quantisation,
tensor-parallel size) a server is started on NEW and asked for greedy tokens and logprobs. Others are started on BASE,
one for each way into the engine, pushed to NEW, asked the same, and pushed back to BASE. A server that refuses a push
has to be unchanged. Prints a table, exits 1 unless all agree. Servers of a round run side by side. Needs weightsync
importable, and CUDA.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from engines.gpu_servers import Case, Server, compare, gpu_memory, stop_all
from weightsync.errors import PushRefused, WeightSyncError
from weightsync.operator import fetch_status
from weightsync.sources.checkpoint import CheckpointSource
from weightsync.trainer.client import push_source

# A stock SGLang does not say that it sleeps: its trainer has to wake it.
SLEEPERS = (
    *(Case("vllm", way, sleep=level) for level in "12" for way in ("ipc", "plugin", "extension")),
    Case("vllm", "plugin", "moe", sleep="2"),
    *(Case("sglang", "plugin", model, sleep="all") for model in ("dense", "moe")),
)


@dataclass
class Outcome:
    case: str
    software: str = ""
    profile: str = ""
    tokens_equal: bool = False
    worst_logprob: float = float("nan")
    back_equal: bool = False
    moved: bool = False  # the two checkpoints do generate differently
    seconds: list[float] = field(default_factory=list)
    freed_mib: list[int] = field(default_factory=list)  # by sleeping before each push
    refused: str = ""  # why nothing was loaded; good if the engine goes on as before
    problem: str = ""

    @property
    def good(self) -> bool:
        return (self.tokens_equal or bool(self.refused)) and self.back_equal and self.moved and not self.problem


class Daemon:
    """One weightsyncd for the servers of a round."""

    def __init__(self, servers: list[Server], options: argparse.Namespace, model: str = "") -> None:
        """Each engine's model is its own name, or `model` for all if that is given."""
        self.endpoint = f"ipc://{options.logs}/d.sock"
        config = options.logs / "node.toml"
        lines = [
            "[node]",
            'name = "gpuproof"',
            f'listen = "{self.endpoint}"',
            "[arena]",
            f'slot_bytes = "{options.slot}"',
        ]
        lines += ["alignment = 8", "[timeouts]", "operation = 120", "probe = 20"]
        for server in servers:
            case = server.case
            lines += ["[[engines]]", f'name = "{case.name}"', f'kind = "{case.kind}"', f'url = "{server.url}"']
            lines += [f'path = "{case.path}"', f'model = "{model or case.name}"']
        config.write_text("\n".join(lines) + "\n")
        self.log = options.logs / "weightsyncd.log"
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "weightsyncd", "--node-config", str(config)],
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.engines: dict[str, Any] = {}
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.engines = {e.name: e for e in fetch_status(self.endpoint).engines}
            except WeightSyncError:
                time.sleep(0.3)
                continue
            if all(e.state != "unknown" for e in self.engines.values()):
                return
            time.sleep(0.3)
        unknown = [name for name, e in self.engines.items() if e.state == "unknown"]
        print(f"weightsyncd knows nothing of {unknown or 'any engine'}, see {self.log}", flush=True)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def prove(case: Case, server: Server, daemon: Daemon, wanted: list[Any], options: argparse.Namespace) -> Outcome:
    outcome = Outcome(case.name)
    about = daemon.engines.get(case.name)
    if about is not None:
        outcome.software, outcome.profile = about.software or "", about.profile or ""
    base = server.generate()
    outcome.moved = not compare(base, wanted)[0]
    try:
        for version, tag in ((1, "new"), (2, "base"), (3, "new"), (4, "base")):
            if case.sleep:
                outcome.freed_mib.append(server.sleep())
            with CheckpointSource(options.models / f"{case.model}-{tag}") as source:
                report = push_source(
                    source,
                    version=version,
                    model=case.name,
                    daemon=daemon.endpoint,
                    timeout=300.0,
                    quantise=options.models / f"{case.served}-base" if case.quantization == "block" else None,
                )
            outcome.seconds.append(round(report.seconds, 3))
            if not report.complete:
                outcome.problem = "; ".join(str(e.error.message) for e in report.engines if e.error)
                return outcome
            if version == 1:
                outcome.tokens_equal, outcome.worst_logprob = compare(server.generate(), wanted)
    except PushRefused as refusal:
        outcome.refused = refusal.message
    except (WeightSyncError, OSError) as error:
        outcome.problem = f"{type(error).__name__}: {error}"
        return outcome
    outcome.back_equal = compare(server.generate(), base)[0]
    return outcome


def soak(servers: list[Server], options: argparse.Namespace) -> dict[str, Any]:
    """Push base and new in turn to all engines at once: does any process leave memory behind on a GPU?"""
    daemon = Daemon(servers, options, model="soak")
    before: dict[int, int] = {}
    seconds, incomplete, problem = [], 0, ""
    with ExitStack() as stack:
        model = servers[0].case.model
        pair = [stack.enter_context(CheckpointSource(options.models / f"{model}-{tag}")) for tag in ("base", "new")]
        for turn in range(1, options.soak + 1):
            try:
                report = push_source(
                    pair[turn % 2], version=100 + turn, model="soak", daemon=daemon.endpoint, timeout=120.0
                )
            except (WeightSyncError, OSError) as error:
                incomplete, problem = incomplete + 1, f"{type(error).__name__}: {error}"
                break
            seconds.append(report.seconds)
            if not report.complete:
                incomplete += 1
                problem = "; ".join(f"{e.engine}: {e.error.message}" for e in report.engines if e.error)
            if turn == 2:
                before = gpu_memory()
    after = gpu_memory()
    outstanding = sum(bridge.outstanding for bridge in fetch_status(daemon.endpoint).bridges)
    daemon.stop()
    grown = {pid: after[pid] - mib for pid, mib in before.items() if after.get(pid, mib) != mib}
    found = {
        "engines": [server.case.name for server in servers],
        "pushes": len(seconds),
        "incomplete": incomplete,
        "problem": problem,
        "processes": len(before),
        "mib_grown_by_process": grown,
        "outstanding": outstanding,
        "seconds_median": statistics.median(seconds) if seconds else None,
        "equal": bool(before) and not any(by > 0 for by in grown.values()) and not outstanding and not incomplete,
    }
    print(f"soak {found}", flush=True)
    return found


def rounds(cases: list[Case], most: int) -> list[list[Case]]:
    return [cases[at : at + most] for at in range(0, len(cases), most)]


def start(cases: list[Case], tag: str, gpus: int, options: argparse.Namespace, port: int) -> list[Server]:
    servers = []
    for i, case in enumerate(cases):
        visible = ",".join(str((i + k) % gpus) for k in range(case.tp))
        servers.append(Server(case, options.models / f"{case.served}-{tag}", port + 20 * i, visible, options))
    return servers


def play(
    batch: list[Case],
    wanted: dict[tuple[Any, ...], list[Any]],
    outcomes: list[Outcome],
    soaks: list[dict[str, Any]],
    gpus: int,
    options: argparse.Namespace,
    port: int,
) -> None:
    """Play one round: start the servers on BASE, and those on NEW whose answers are not known yet, and prove each."""
    began = time.monotonic()
    firsts = {c.oracle: Case(c.kind, "", c.model, c.tp, c.quantization) for c in batch if c.oracle not in wanted}
    with ExitStack() as running:
        oracles = start(list(firsts.values()), "new", gpus, options, port)
        running.callback(stop_all, oracles)
        servers = start(batch, "base", gpus, options, port + 200)
        running.callback(stop_all, servers)
        for oracle in oracles:
            problem = oracle.wait()
            if problem:
                print(f"oracle {oracle.case.name}: {problem}", flush=True)
            else:
                wanted[oracle.case.oracle] = oracle.generate()
        stop_all(oracles)
        problems = {server.case.name: server.wait() for server in servers}
        ready = [server for server in servers if not problems[server.case.name] and server.case.oracle in wanted]
        outcomes += [Outcome(name, problem=problem) for name, problem in problems.items() if problem]
        print(f"{len(ready)} of {len(batch)} servers ready after {time.monotonic() - began:.0f} s", flush=True)
        daemon = Daemon(ready, options)
        running.callback(daemon.stop)
        for server in ready:
            outcomes.append(prove(server.case, server, daemon, wanted[server.case.oracle], options))
            o = outcomes[-1]
            print(
                f"{'good' if o.good else 'BAD':4} {o.case:26} tokens {o.tokens_equal!s:5} "
                f"logprob {o.worst_logprob:.0e} back {o.back_equal!s:5} seconds {o.seconds} "
                f"freed MiB {o.freed_mib} {o.refused[:200]} {o.problem[:300]}",
                flush=True,
            )
        daemon.stop()
        took = {o.case for o in outcomes if o.good and not o.refused}
        if options.soak and (lasting := [server for server in ready if server.case.name in took]):
            soaks.append(soak(lasting, options))
    print(f"{len(batch)} cases in {time.monotonic() - began:.0f} s", flush=True)


def write(outcomes: list[Outcome], soaks: list[dict[str, Any]], gpus: int, options: argparse.Namespace) -> None:
    if options.json is None:
        return
    about = {"gpus": gpus, "gpu": torch.cuda.get_device_name(0), "torch": torch.__version__, "command": sys.argv}
    cases = [asdict(o) | {"good": o.good} for o in outcomes]
    options.json.write_text(json.dumps({**about, "cases": cases, "soaks": soaks}, indent=1))


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", type=Path, required=True)
    p.add_argument("--vllm", default="")
    p.add_argument("--sglang", default="")
    p.add_argument("--plugins", type=Path, default=None, help="folder that makes weightsync's plugins known")
    p.add_argument("--logs", type=Path, default=Path("/tmp/gpu-proof"))
    p.add_argument("--memory", type=float, default=0.1)
    p.add_argument("--slot", default="4MiB")
    p.add_argument("--side-by-side", type=int, default=6)
    p.add_argument("--only", default="*", help="patterns of cases' names, by commas: *-dense-tp1")
    p.add_argument("--soak", type=int, default=0, help="then push so often to all engines of a round at once")
    p.add_argument("--sleep", action="store_true", help="servers that sleep before each push, too")
    p.add_argument("--block", action="store_true", help="servers of NAME-block-base too, which is quantised in blocks")
    p.add_argument("--json", type=Path, default=None)
    options = p.parse_args()
    options.logs.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the servers are stopped
    gpus = torch.cuda.device_count()
    ways = {"vllm": ("ipc", "plugin", "extension"), "sglang": ("tensor", "ipc", "plugin")}
    cases = [
        case
        for kind in ("vllm", "sglang")
        if getattr(options, kind)
        for case in (
            *(Case(kind, way) for way in ways[kind]),
            *(Case(kind, way, "moe") for way in ways[kind]),
            *(Case(kind, way, tp=2) for way in ways[kind] if gpus > 1),
            *(Case(kind, way, quantization="fp8") for way in ways[kind]),
            *(Case(kind, way, quantization="block") for way in ways[kind] if options.block),
            *(case for case in SLEEPERS if case.kind == kind and options.sleep),
        )
    ]
    cases = [case for case in cases if any(fnmatch(case.name, pattern) for pattern in options.only.split(","))]
    wanted: dict[tuple[Any, ...], list[Any]] = {}
    outcomes: list[Outcome] = []
    soaks: list[dict[str, Any]] = []
    for number, batch in enumerate(rounds(cases, options.side_by_side)):
        play(batch, wanted, outcomes, soaks, gpus, options, 21000 + 400 * number)
        write(outcomes, soaks, gpus, options)
    good = sum(o.good for o in outcomes)
    print(f"{good} of {len(cases)} cases good on {gpus} x {torch.cuda.get_device_name(0)}, torch {torch.__version__}")
    return 0 if good == len(cases) and all(s["equal"] for s in soaks) else 1


if __name__ == "__main__":
    sys.exit(main())
