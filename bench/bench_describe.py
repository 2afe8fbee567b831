"""What describing a rank's weights costs before a push: the first time, and again when only values have changed.

    python -m bench describe --json out.json

"Changed" is a push after one parameter was replaced by one of another shape: everything is described anew. "Moved" is a
push after every tensor got other memory. "Located" is added if slots lie on GPUs: addresses and strides. Garbage
collections during a run count, as they do in a trainer.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from bench.harness import JsonOption, report, suite, timed
from weightsync.filling.local import LocalWeights
from weightsync.sources import source_of

if TYPE_CHECKING:
    from collections.abc import Callable

LAYERS, LEAVES = (
    47,
    404,
)  # as in a model of 30 billion parameters: each layer has 128 experts of three weights, and 20 other weights


@dataclass(frozen=True)
class Figures:
    """Seconds."""

    case: str
    tensors: int
    first: float
    again: float
    again_worst: float
    as_bfloat16: float
    located: float
    moved: float | None
    changed: float


class Leaf(nn.Module):
    """One small weight."""

    def __init__(self, make: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(make())


def experts(make: Callable[[], torch.Tensor]) -> nn.Module:
    """Make a module with as many weights as a mixture of experts has, all small, each in its own submodule."""
    return nn.ModuleList(nn.ModuleDict({f"w{i}": Leaf(make) for i in range(LEAVES)}) for _ in range(LAYERS))


def small() -> torch.Tensor:
    """Make a small float32 matrix."""
    return torch.zeros(2, 2)


def measured(case: str, weights: Any, move: Callable[[], object] | None, change: Callable[[], object]) -> Figures:
    """Measure describing `weights`: repeatedly, and after `move` and `change`."""
    start = time.perf_counter()
    source = source_of(weights)
    first = time.perf_counter() - start
    tensors = len(source.layout())
    again = timed(lambda: source_of(weights), runs=21)
    as_bfloat16 = timed(lambda: source_of(weights, dtype="bfloat16"), runs=21)
    located = timed(lambda: LocalWeights(source), runs=21)
    moved = None
    if move is not None:
        move()
        moved = timed(lambda: source_of(weights), runs=1, warmup=0).best
    change()
    changed = timed(lambda: source_of(weights), runs=1, warmup=0).best
    return Figures(case, tensors, first, again.median, again.worst, as_bfloat16.median, located.median, moved, changed)


def replace_last(module: nn.Module, make: Callable[[], torch.Tensor]) -> None:
    """Give the last weight another shape."""
    last = [child for child in module.modules() if isinstance(child, Leaf)][-1]
    last.weight = nn.Parameter(make())


def main(to: JsonOption = None) -> None:
    """Measure, print, write."""
    figures = []

    mapping = {f"t{i}": small() for i in range(19_000)}

    def move_mapping() -> None:
        mapping.update({name: tensor.clone() for name, tensor in mapping.items()})

    figures.append(measured("mapping", mapping, move_mapping, lambda: mapping.update(t7=torch.zeros(3))))

    module = experts(small)
    modules = sum(1 for _ in module.modules())

    def move_module() -> None:
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()

    figures.append(
        measured(
            f"module, {modules:,} submodules", module, move_module, lambda: replace_last(module, lambda: torch.zeros(3))
        )
    )

    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        mesh = init_device_mesh("cpu", (1,))

        def sharded() -> torch.Tensor:
            return DTensor.from_local(small(), mesh, [Shard(0)], run_check=False)

        parallel = experts(sharded)
        figures.append(
            measured(
                f"module of DTensors, {modules:,} submodules",
                parallel,
                None,
                lambda: replace_last(parallel, lambda: DTensor.from_local(torch.zeros(3), mesh, [Shard(0)])),
            )
        )
        dist.destroy_process_group()
    rows = [
        [
            f.case,
            f"{f.tensors:,}",
            *(
                "" if seconds is None else f"{seconds * 1e3:.1f} ms"
                for seconds in (f.first, f.again, f.again_worst, f.as_bfloat16, f.located, f.moved, f.changed)
            ),
        ]
        for f in figures
    ]
    columns = ("", "tensors", "first", "again", "worst", "as bfloat16", "located", "moved", "changed")
    report("Describing weights, one rank", columns, rows, list(map(asdict, figures)), to)


app = suite(main)
if __name__ == "__main__":
    app()
