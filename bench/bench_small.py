"""Pushes of one small tensor, to an engine of TP 1 and one of TP 2: the time that a push takes even with few bytes.

python -m bench small --json out.json
"""

from __future__ import annotations

import time
from typing import Annotated

import torch
import typer

from bench.harness import JsonOption, Spread, report, suite
from weightsync import push_weights
from weightsync.adapters.reference.config import ModelConfig, write_config
from weightsync.adapters.reference.sharding import checkpoint_tensors
from weightsync.fleet import Fleet

SMALL = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
WARM = 10  # pushes that do not count


def main(
    pushes: Annotated[int, typer.Option(min=1, help="Measured pushes, after 10 that warm up.")] = 200,
    to: JsonOption = None,
) -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    with Fleet() as fleet:
        checkpoint = fleet.root / "small"
        checkpoint.mkdir()
        write_config(SMALL, checkpoint)
        flags = ("--load-format", "dummy")
        engines = [fleet.start_engine(f"small-{tp}", checkpoint, tp=tp, flags=flags, wait=False) for tp in (1, 2)]
        for engine in engines:
            fleet.wait_engine(engine)
        daemon = fleet.start_daemon("small-node", engines, arena={"slot_bytes": "1MiB"})
        full = {name: torch.zeros(shape) for name, shape in checkpoint_tensors(SMALL).items()}
        push_weights(full, version=0, daemon=daemon.endpoint)
        smallest = min(full, key=lambda name: full[name].numel())
        seconds = []
        for version in range(1, pushes + WARM + 1):
            start = time.perf_counter()
            push_weights({smallest: full[smallest]}, version=version, daemon=daemon.endpoint)
            seconds.append(time.perf_counter() - start)
    spread = Spread.of(seconds[WARM:])
    row = [f"{value * 1e3:.1f} ms" for value in (spread.p50, spread.p99, spread.max)]
    figures = {"engines": len(engines), "bytes": full[smallest].nbytes, "seconds": spread}
    report("Pushes of one small tensor", ("pushes", "p50", "p99", "max"), [[str(pushes), *row]], figures, to)


app = suite(main)
if __name__ == "__main__":
    app()
