"""What a bucket costs besides its bytes: processor time of each process, in pushes of many tiny buckets.

    python -m bench control --tp 2 --json out.json

This cost limits pushes of many or small buckets: for each bucket the daemon hears from every rank, and has it exported,
loaded and released. Figures are medians over the pushes, and the least, since processes share this machine's cores.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import psutil
import torch
import typer

from bench.bench_small import SMALL
from bench.harness import JsonOption, SlotOption, report, suite
from weightsync import push_weights
from weightsync.adapters.reference.config import write_config
from weightsync.adapters.reference.sharding import checkpoint_tensors
from weightsync.fleet import Fleet

MODEL = msgspec.structs.replace(SMALL, vocab_size=4096, num_hidden_layers=96, dtype="bfloat16")


@dataclass(frozen=True)
class Figures:
    """Seconds of processor time for each bucket."""

    process: str
    median: float
    least: float


def processor_seconds(pid: int) -> float:
    """Return the processor time of a process so far, over all its threads, exact to the nanosecond."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def main(
    pushes: Annotated[int, typer.Option(min=1, help="Measured pushes, after 2 that warm up.")] = 40,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel size of the engine.")] = 1,
    slot: SlotOption = "64KiB",
    to: JsonOption = None,
) -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    weights = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in checkpoint_tensors(MODEL).items()}
    with Fleet() as fleet:
        (fleet.root / "model").mkdir()
        write_config(MODEL, fleet.root / "model")
        engine = fleet.start_engine("e0", fleet.root / "model", tp=tp, flags=["--load-format", "dummy"])
        daemon = fleet.start_daemon("bench", [engine], arena={"slots": 3, "slot_bytes": slot})
        for version in (1, 2):
            push_weights(weights, version=version, daemon=daemon.endpoint)
        (bridge,) = psutil.Process(daemon.pid).children()
        pids = {"trainer rank": psutil.Process().pid, "daemon": daemon.pid, "bridge": bridge.pid, "engine": engine.pid}
        workers = psutil.Process(engine.pid).children()
        pids |= {f"engine worker {rank}": worker.pid for rank, worker in enumerate(workers)}
        wall: list[float] = []
        busy: dict[str, list[float]] = {name: [] for name in pids}
        for version in range(3, 3 + pushes):
            before = {name: processor_seconds(pid) for name, pid in pids.items()}
            start = time.perf_counter()
            buckets = push_weights(weights, version=version, daemon=daemon.endpoint).buckets
            wall.append(time.perf_counter() - start)
            for name, pid in pids.items():
                busy[name].append((processor_seconds(pid) - before[name]) / buckets)
    figures = [Figures(name, statistics.median(seconds), min(seconds)) for name, seconds in busy.items()]
    rows = [[f.process, f"{f.median * 1e6:.0f} µs", f"{f.least * 1e6:.0f} µs"] for f in figures]
    rows.append(
        ["wall time", *(f"{seconds / buckets * 1e6:.0f} µs" for seconds in (statistics.median(wall), min(wall)))]
    )
    title = f"Processor time for each of {buckets} buckets of {len(weights)} tensors"
    report(title, ("", "median", "least"), rows, figures, to)


app = suite(main)
if __name__ == "__main__":
    app()
