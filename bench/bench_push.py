"""Whole pushes through a real weightsyncd into reference engines, against this machine's memory ceiling.

    python -m bench.bench_push --json out.json

Four questions: how fast a model goes through shared memory (each byte is copied twice: into the slot, and into the
engine), what it costs to keep a copy for engines that come late, what a push costs whatever its bytes, and how much
memory the daemon and its bridges take.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from bench.harness import copy_ceiling, report
from weightsync import push_weights
from weightsync.adapters.reference.config import ModelConfig, write_config
from weightsync.adapters.reference.sharding import checkpoint_tensors
from weightsync.fleet import Fleet

if TYPE_CHECKING:
    from weightsync.fleet import Daemon

# Qwen3-0.6B's shapes with 44 layers instead of 28: 2.0 GB in bfloat16
MODEL = ModelConfig(
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=44,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    dtype="bfloat16",
)
SMALL = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
COPIES = 2  # of each byte: trainer → slot, slot → engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--pushes", type=int, default=7, help="measured pushes of the model, after 2 that warm up")
    parser.add_argument("--small", type=int, default=200, help="measured pushes of one small tensor")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size of the engine")
    parser.add_argument("--slot", default="64MiB", help="arena.slot_bytes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with Fleet() as fleet:
        figures = {
            "model": measure_model(fleet, arguments.pushes, arguments.tp, arguments.slot),
            "retained": measure_model(fleet, arguments.pushes, arguments.tp, arguments.slot, retain="host"),
            "small": measure_small(fleet, arguments.small),
        }
    model, retained, small = figures["model"], figures["retained"], figures["small"]
    rows = [
        ["model", f"{model['bytes'] / 1e9:.2f} GB, {model['tensors']} tensors, tp {arguments.tp}"],
        ["one-core memcpy, same run", f"{model['memcpy_bytes_per_second'] / 1e9:.2f} GB/s"],
        ["push, median of " + str(arguments.pushes), f"{model['seconds_median']:.3f} s"],
        ["  of that the trainer is blocked", f"{model['blocked_seconds_median']:.3f} s"],
        ["  model bytes per second", f"{model['bytes'] / model['seconds_median'] / 1e9:.2f} GB/s"],
        ["  per copied byte, ratio to memcpy", f"{model['ratio_to_memcpy']:.2f}"],
        *([f"  {phase}", f"{seconds * 1e3:.0f} ms"] for phase, seconds in model["phases_median"].items()),
        [
            "push where node.retain = host, times the other",
            f"{retained['seconds_median'] / model['seconds_median']:.2f}",
        ],
        [
            "push of one small tensor, p50 / p99 of " + str(arguments.small),
            f"{small['p50'] * 1e3:.1f} / {small['p99'] * 1e3:.1f} ms",
        ],
        ["daemon, resident", f"{model['rss']['daemon'] / 1e6:.0f} MB"],
        ["bridge, resident without its arena", f"{model['rss']['bridge'] / 1e6:.0f} MB"],
    ]
    report("pushes through shared memory", ["what", "figure"], rows, figures, arguments.json)


def measure_model(fleet: Fleet, pushes: int, tp: int, slot: str, retain: str = "none") -> dict[str, Any]:
    """The model, pushed again and again to one engine."""
    checkpoint = fleet.root / "model"
    checkpoint.mkdir(exist_ok=True)
    write_config(MODEL, checkpoint)
    weights = {n: torch.randn(s).to(torch.bfloat16) for n, s in checkpoint_tensors(MODEL).items()}
    nbytes = sum(w.nbytes for w in weights.values())
    engine = fleet.start_engine("big", checkpoint, tp=tp, flags=("--load-format", "dummy"))
    arena = {"slot_bytes": slot, "slots": 3}
    daemon = fleet.start_daemon("big-node", [engine], arena=arena, node={"retain": retain})
    reports = [push_weights(weights, version=v, daemon=daemon.endpoint, timeout=120) for v in range(pushes + 2)]
    measured = reports[2:]
    ceiling = copy_ceiling()
    seconds = statistics.median(r.seconds for r in measured)
    rss = resident(daemon)
    fleet.end(daemon)
    fleet.end(engine)
    return {
        "bytes": nbytes,
        "tensors": len(weights),
        "buckets": measured[0].buckets,
        "slot": slot,
        "tp": tp,
        "memcpy_bytes_per_second": ceiling,
        "seconds_first": reports[0].seconds,
        "seconds": [r.seconds for r in measured],
        "seconds_median": seconds,
        "blocked_seconds_median": statistics.median(r.blocked_seconds for r in measured),
        "phases_median": {p: statistics.median(r.phases[p] for r in measured) for p in measured[0].phases},
        "ratio_to_memcpy": COPIES * nbytes / seconds / ceiling,
        "rss": rss,
    }


def measure_small(fleet: Fleet, pushes: int) -> dict[str, Any]:
    """Pushes of one small tensor, to two engines: what a push takes whatever its bytes."""
    checkpoint = fleet.root / "small"
    checkpoint.mkdir()
    write_config(SMALL, checkpoint)
    engines = [
        fleet.start_engine(f"small-{tp}", checkpoint, tp=tp, flags=("--load-format", "dummy"), wait=False)
        for tp in (1, 2)
    ]
    for engine in engines:
        fleet.wait_engine(engine)
    daemon = fleet.start_daemon("small-node", engines, arena={"slot_bytes": "1MiB"})
    full = {n: torch.zeros(s) for n, s in checkpoint_tensors(SMALL).items()}
    push_weights(full, version=0, daemon=daemon.endpoint)
    smallest = min(full, key=lambda name: full[name].numel())
    seconds = []
    for version in range(1, pushes + 11):
        start = time.perf_counter()
        push_weights({smallest: full[smallest]}, version=version, daemon=daemon.endpoint)
        seconds.append(time.perf_counter() - start)
    ordered = sorted(seconds[10:])
    return {
        "pushes": pushes,
        "engines": len(engines),
        "p50": ordered[len(ordered) // 2],
        "p99": ordered[int(len(ordered) * 0.99)],
        "max": ordered[-1],
    }


def resident(daemon: Daemon) -> dict[str, int]:
    """Bytes resident in the daemon and in one of its bridges, shared memory not counted."""
    process = psutil.Process(daemon.pid)
    bridges = process.children()
    own = [p.memory_info().rss - p.memory_info().shared for p in (process, *bridges)]
    return {"daemon": own[0], "bridge": max(own[1:], default=0)}


if __name__ == "__main__":
    main()
