"""Runs the demo: checkpoints, engines, two daemons, two trainer ranks. Shows each push, leaves nothing behind."""

from __future__ import annotations

import json
import os
import select
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsync.adapters.reference.checkpoint import random_checkpoint
from weightsync.adapters.reference.config import ModelConfig
from weightsync.fleet import Child, Engine, Fleet, FleetError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

__all__ = ["DemoResult", "run_demo"]

_STEP_SECONDS = 120.0
_NODES = f"demo{os.getpid()}"  # prefix of this run's node names, which files in /dev/shm contain
DENSE = ModelConfig(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
)
MOE = ModelConfig(
    architecture="Qwen3MoeForCausalLM",
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    num_experts=16,
    num_experts_per_tok=2,
    moe_intermediate_size=256,
    norm_topk_prob=True,
    dtype="bfloat16",
)
ACTS = {"Qwen3 (dense, float32)": DENSE, "Qwen3-MoE (16 experts, bfloat16)": MOE}


@dataclass
class DemoResult:
    """The demo's result: `ok` if every push was equal everywhere and nothing was left behind."""

    pushes: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    left_behind: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return bool(self.pushes) and not self.left_behind and all(push["equal"] for push in self.pushes)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}


def run_demo(console: Console, *, steps: int = 5) -> DemoResult:
    """Push `steps` versions of each model of `ACTS`. Raises `FleetError` if a process fails."""
    started = time.monotonic()
    result = DemoResult()
    with Fleet() as fleet:
        for title, config in ACTS.items():
            _act(console, fleet, title, config, steps, result)
        root, pids = fleet.root, [child.pid for child in fleet.children]
    result.left_behind += [f"/dev/shm/{name}" for name in sorted(os.listdir("/dev/shm")) if f"-{_NODES}-" in name]
    result.left_behind += [f"process {pid}" for pid in pids if Path(f"/proc/{pid}").exists()]
    result.left_behind += [str(root)] if root.exists() else []
    result.seconds = time.monotonic() - started
    return result


def _act(console: Console, fleet: Fleet, title: str, config: ModelConfig, steps: int, result: DemoResult) -> None:
    kind = "moe" if config.moe else "dense"
    console.rule(f"[bold]{title}")
    with console.status("making a checkpoint, starting three engines and two daemons …"):
        checkpoint = fleet.root / kind
        random_checkpoint(config, checkpoint, seed=7)
        engines = [
            fleet.start_engine(f"{kind}-{name}", checkpoint, tp=tp, wait=False)
            for name, tp in (("tp1", 1), ("tp2", 2), ("far-tp2", 2))
        ]
        for engine in engines:
            fleet.wait_engine(engine)
        arena = {"slot_bytes": "16MiB", "slots": 3}
        far = fleet.start_daemon(f"{_NODES}-{kind}-1", engines[2:], arena=arena)
        near = fleet.start_daemon(f"{_NODES}-{kind}-0", engines[:2], peers=[far], arena=arena)
    console.print(
        f"weightsyncd on node0 with engines tp 1 and tp 2, on node1 with tp 2, joined by gloo; 2 FSDP2 ranks train "
        f"for {steps} steps and push after each"
    )
    rows = fleet.root / f"{kind}.jsonl"
    by_name = {engine.name: {"url": engine.url, "tp": engine.tp} for engine in engines}
    arguments = ["--checkpoint", str(checkpoint), "--daemon", near.endpoint, "--engines", json.dumps(by_name)]
    trainer = fleet.torchrun(
        f"{kind}-trainer",
        Path(__file__).with_name("trainer.py"),
        2,
        [*arguments, "--steps", str(steps), "--rows", str(rows)],
    )
    console.print(_HEADER, style="bold")
    with console.status("the trainer ranks start …") as status:
        for row in _rows(trainer, rows, steps):
            push = _judge(kind, row, engines)
            result.pushes.append(push)
            console.print(_line(push))
            status.update(f"pushed version {push['version']} of {steps} …")
        trainer.wait(_STEP_SECONDS)
    for child in (trainer, near, far, *engines):
        fleet.end(child)


def _rows(trainer: Child, path: Path, count: int) -> Iterator[dict[str, Any]]:
    """Yield each line of the file as it appears. Raises `FleetError` with the trainer's log if it fails or stalls."""
    seen = 0
    deadline = time.monotonic() + _STEP_SECONDS
    while seen < count:
        ended = trainer.process.poll() is not None
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines[seen:]:
            yield json.loads(line)
            deadline = time.monotonic() + _STEP_SECONDS
        seen = len(lines)
        if seen < count and ended:
            raise FleetError(f"the trainer ended with status {trainer.process.returncode}\n{trainer.tail(100)}")
        if time.monotonic() > deadline:
            raise FleetError(f"the trainer has not pushed for {_STEP_SECONDS:g} s\n{trainer.tail(100)}")
        select.select([], [], [], 0.05)


def _judge(kind: str, row: dict[str, Any], engines: list[Engine]) -> dict[str, Any]:
    """Return the summary of one push."""
    report, compared = row["report"], row["engines"]
    ranks = sum(engine.tp for engine in engines)
    ranks_equal = sum(e["ranks_equal"] for e in compared.values())
    tokens_equal = sum(e["tokens_equal"] and e["version_equal"] for e in compared.values())
    return {
        "model": kind,
        "version": report["version"],
        "bytes": report["bytes"],
        "seconds": report["seconds"],
        "gigabytes_per_second": report["bytes"] / report["seconds"] / 1e9,
        "trainer_blocked_seconds": report["blocked_seconds"],
        "loss": row["loss"],
        "ranks": ranks,
        "ranks_equal": ranks_equal,
        "engines": len(engines),
        "tokens_equal": tokens_equal,
        "tokens": row["tokens"],
        "equal": report["complete"] and ranks_equal == ranks and tokens_equal == len(engines),
    }


_HEADER = "version      MB  seconds   GB/s   loss  checksums equal   greedy tokens equal to the trainer's"


def _line(push: dict[str, Any]) -> str:
    colour = "green" if push["equal"] else "red"
    numbers = f"{push['version']:7d} {push['bytes'] / 1e6:7.1f} {push['seconds']:8.3f}"
    speed = f"{push['gigabytes_per_second']:6.2f} {push['loss']:6.2f}"
    ranks = f"{push['ranks_equal']} of {push['ranks']} ranks"
    tokens = " ".join(str(t) for t in push["tokens"][:4])
    engines = f"{push['tokens_equal']} of {push['engines']} engines: {tokens} …"
    return f"{numbers} {speed}  [{colour}]{ranks:<16}  {engines}[/]"
