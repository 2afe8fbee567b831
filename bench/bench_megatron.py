"""What describing a rank of a Megatron trainer costs before a push: the first time, and again.

    python -m bench.bench_megatron --json out.json

The model is a real megatron-core model of 48 layers with 128 experts each and very small weights, all on one rank. It
has as many parameters, and parts of checkpoint tensors, as Qwen3-30B-A3B. "Moved" is a push after every parameter got
other memory. "Located" is added if slots lie on GPUs: addresses and strides. Needs `weightsync[megatron]`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from bench.harness import report, timed
from tests.megatron_kit import Shape, build, without_gpus
from weightsync.filling.local import LocalWeights
from weightsync.sources import MegatronSource


@dataclass(frozen=True)
class Figures:
    """Seconds."""

    case: str
    parameters: int
    parts: int
    first: float
    again: float
    again_worst: float
    moved: float
    located: float


def measured(case: str, shape: Shape, *, like_te: bool) -> Figures:
    """Measure describing a model of `shape`: repeatedly, and after its parameters have moved."""
    (model,) = build(shape, like_te=like_te)
    start = time.perf_counter()
    source = MegatronSource(model, shape.facts())
    first = time.perf_counter() - start
    again = timed(lambda: MegatronSource(model, shape.facts()), runs=21)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    moved = timed(lambda: MegatronSource(model, shape.facts()), runs=1, warmup=0).best
    located = timed(lambda: LocalWeights(source), runs=21)
    parameters = sum(1 for _ in model.parameters())
    parts = len(source.layout())
    return Figures(case, parameters, parts, first, again.median, again.worst, moved, located.median)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    from megatron.core import parallel_state

    shape = Shape("qwen3_moe", num_hidden_layers=48, num_experts=128, moe_intermediate_size=8, hidden_size=16)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        without_gpus()
        parallel_state.initialize_model_parallel()
        figures = [
            measured("one module for each expert (SequentialMLP)", shape, like_te=False),
            measured("one module for a layer's experts (TEGroupedMLP)", shape, like_te=True),
        ]
        dist.destroy_process_group()
    rows = [
        [f.case, f"{f.parameters:,}", f"{f.parts:,}"]
        + [f"{seconds * 1e3:.1f} ms" for seconds in (f.first, f.again, f.again_worst, f.moved, f.located)]
        for f in figures
    ]
    columns = ("", "parameters", "parts", "first", "again", "worst", "moved", "located")
    report("Describing a Megatron rank", columns, rows, list(map(asdict, figures)), arguments.json)


if __name__ == "__main__":
    main()
