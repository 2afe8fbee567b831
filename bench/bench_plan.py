"""What planning costs: layouts are unpacked and planned, the manifest is sent on; and the cost of a known plan.

\b
    python -m bench plan --json out.json
    python -m bench plan --shape deepseek-v3 --ranks 256

Layouts are given as bytes, one per rank, as a daemon receives them. "Parts" is the work of one trainer rank that has
got the manifest. "Known" is a push whose layouts were planned before: a look-up by the tuple of their digests.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, TypeVar

import numpy as np
import typer

from bench import shapes
from bench.harness import JsonOption, report, size, suite, timed
from weightsync.plan.buckets import Plan, plan_push
from weightsync.plan.manifest import Layout, Manifest, TensorTable
from weightsync.plan.parts import parts_by_bucket

if TYPE_CHECKING:
    from collections.abc import Callable

OWNERS = 8
PROJECTIONS = ("gate", "up", "down")
T = TypeVar("T")


@dataclass(frozen=True)
class Figures:
    """Seconds, unless they say otherwise."""

    case: str
    ranks: int
    tensors: int
    shards: int
    buckets: int
    layout_bytes: int
    manifest_bytes: int
    unpack: float
    plan: float
    pack_manifest: float
    unpack_manifest: float
    parts: float
    known: float


def experts(count: int) -> tuple[str, ...]:
    """Return names of tensors as in a mixture of experts: 128 experts a layer, three tensors each."""
    return tuple(
        f"model.layers.{i // 384}.mlp.experts.{i % 384 // 3}.{PROJECTIONS[i % 3]}_proj.weight" for i in range(count)
    )


def table(count: int, shape: tuple[int, int]) -> TensorTable:
    """`count` bfloat16 matrices."""
    return TensorTable(experts(count), ("bfloat16",) * count, (shape,) * count)


def rows_of(tensors: TensorTable, rank: int, ranks: int) -> Layout:
    """Return the layout of one rank under FSDP: its rows of every tensor."""
    count = len(tensors)
    offset, shape = np.zeros((count, 2), np.int64), tensors.dims.copy()
    rows = tensors.dims[:, 0]
    offset[:, 0] = rows * rank // ranks
    shape[:, 0] = rows * (rank + 1) // ranks - offset[:, 0]
    return Layout(tensors, np.arange(count, dtype=np.int32), offset, shape)


def measured(case: str, layouts: list[Layout], slot_bytes: int) -> Figures:
    """Measure planning these layouts once, cold, as a daemon and its ranks do."""
    packed = [layout.pack() for layout in layouts]

    def unpack() -> list[Layout]:
        tables: dict[bytes, TensorTable] = {}
        return [Layout.unpack(data, tables) for data in packed]

    received, unpack_seconds = once(unpack)
    plan, plan_seconds = once(lambda: plan_push(received, slot_bytes=slot_bytes, owners=OWNERS))
    sent, pack_seconds = once(plan.manifest.pack)
    manifest, manifest_seconds = once(lambda: Manifest.unpack(sent))
    _, parts_seconds = once(lambda: parts_by_bucket(manifest, layouts[0], plan.fills[0]))
    plans = {tuple(layout.digest for layout in received): plan}
    digests = [layout.digest for layout in received]
    look_ups = 1000

    def known() -> Plan | None:
        found = None
        for _ in range(look_ups):
            found = plans[tuple(digests)]
        return found

    return Figures(
        case=case,
        ranks=len(layouts),
        tensors=len(plan.manifest.tensors),
        shards=sum(map(len, layouts)),
        buckets=plan.manifest.buckets,
        layout_bytes=sum(map(len, packed)),
        manifest_bytes=len(sent),
        unpack=unpack_seconds,
        plan=plan_seconds,
        pack_manifest=pack_seconds,
        unpack_manifest=manifest_seconds,
        parts=parts_seconds,
        known=timed(known).median / look_ups,
    )


def once(job: Callable[[], T]) -> tuple[T, float]:
    """Run a job once. Returns its result and its seconds."""
    start = time.perf_counter()
    result = job()
    return result, time.perf_counter() - start


CASES: dict[str, Callable[[], list[Layout]]] = {
    "30 B mixture of experts, FSDP over 8": lambda: sharded(18_432, (768, 2048), 8),
    "20,000 tensors, FSDP over 50": lambda: sharded(20_000, (1024, 768), 50),
    "20,000 tensors, FSDP over 25, twice": lambda: sharded(20_000, (1024, 768), 25) * 2,
    "20,000 tensors, 50 replicas": lambda: sharded(20_000, (1024, 768), 1) * 50,
    "1,000,000 tensors, one rank": lambda: sharded(1_000_000, (768, 2048), 1),
}


def sharded(tensors: int, shape: tuple[int, int], ranks: int) -> list[Layout]:
    """The layouts of an FSDP trainer."""
    every = table(tensors, shape)
    return [rows_of(every, rank, ranks) for rank in range(ranks)]


def published(name: str, ranks: int) -> list[Layout]:
    """The layouts of a published model in an FSDP trainer."""
    tensors = shapes.load(name).tensors
    every = TensorTable(
        tuple(tensors), tuple(t.dtype for t in tensors.values()), tuple(t.shape for t in tensors.values())
    )
    return [rows_of(every, rank, ranks) for rank in range(ranks)]


def main(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="A name of `models`, or a path; several times.", show_default="made-up cases"),
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="That have these shapes in FSDP shards.")] = 8,
    slot: Annotated[str, typer.Option(help="arena.slot_bytes; Llama-3-70B needs 1GiB")] = "512MiB",
    to: JsonOption = None,
) -> None:
    """Measure, print, write."""
    if shape:
        figures = [measured(f"{name}, FSDP over {ranks}", published(name, ranks), size(slot)) for name in shape]
    else:
        figures = [measured(case, layouts(), size(slot)) for case, layouts in CASES.items()]
    rows = [
        [
            f.case,
            f"{f.shards:,}",
            f"{f.buckets:,}",
            f"{f.unpack:.2f} s",
            f"{f.plan:.2f} s",
            f"{f.pack_manifest + f.unpack_manifest:.2f} s",
            f"{f.parts:.2f} s",
            f"{f.known * 1e6:.1f} µs",
        ]
        for f in figures
    ]
    columns = ("", "shards", "buckets", "unpack", "plan", "manifest", "parts", "known")
    report(f"Planning, slots of {slot}", columns, rows, list(map(asdict, figures)), to)


app = suite(main)
if __name__ == "__main__":
    app()
