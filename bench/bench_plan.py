"""What planning costs: layouts taken in, planned, the manifest sent on, and the same again when it is known.

    python -m bench.bench_plan --json out.json

Layouts are handed over as bytes, one per rank, as a daemon receives them. "Parts" is what one trainer rank then works
out for itself, "known" what a push costs whose layouts were planned before: a look-up by the tuple of their digests.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from bench.harness import report, timed
from weightsync.plan.buckets import Plan, plan_push
from weightsync.plan.manifest import Layout, Manifest, TensorTable
from weightsync.plan.parts import parts_by_bucket

if TYPE_CHECKING:
    from collections.abc import Callable

SLOT = 512 << 20
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
    """Names of a mixture of experts: 128 experts a layer, three tensors each."""
    return tuple(
        f"model.layers.{i // 384}.mlp.experts.{i % 384 // 3}.{PROJECTIONS[i % 3]}_proj.weight" for i in range(count)
    )


def table(count: int, shape: tuple[int, int]) -> TensorTable:
    """`count` bfloat16 matrices."""
    return TensorTable(experts(count), ("bfloat16",) * count, (shape,) * count)


def rows_of(tensors: TensorTable, rank: int, ranks: int) -> Layout:
    """What FSDP leaves on one rank: its rows of every tensor."""
    count = len(tensors)
    offset, shape = np.zeros((count, 2), np.int64), tensors.dims.copy()
    rows = tensors.dims[:, 0]
    offset[:, 0] = rows * rank // ranks
    shape[:, 0] = rows * (rank + 1) // ranks - offset[:, 0]
    return Layout(tensors, np.arange(count, dtype=np.int32), offset, shape)


def measured(case: str, layouts: list[Layout]) -> Figures:
    """Plan these once, cold, as a daemon and its ranks would."""
    packed = [layout.pack() for layout in layouts]

    def unpack() -> list[Layout]:
        tables: dict[bytes, TensorTable] = {}
        return [Layout.unpack(data, tables) for data in packed]

    received, unpack_seconds = once(unpack)
    plan, plan_seconds = once(lambda: plan_push(received, slot_bytes=SLOT, owners=OWNERS))
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
    """What a job gives, and its seconds."""
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


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    figures = [measured(case, layouts()) for case, layouts in CASES.items()]
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
    report(f"Planning, slots of {SLOT >> 20} MiB", columns, rows, list(map(asdict, figures)), arguments.json)


if __name__ == "__main__":
    main()
