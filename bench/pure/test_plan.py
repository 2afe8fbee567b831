"""Planning a published mixture of experts: what a daemon does with layouts, and a rank with the manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bench.bench_plan import published
from weightsync.plan.buckets import plan_push
from weightsync.plan.manifest import Layout, Manifest, TensorTable
from weightsync.plan.parts import parts_by_bucket

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

SLOT = 512 << 20
OWNERS = 8


@pytest.fixture(scope="module")
def layouts() -> list[Layout]:
    return published("qwen3-30b-a3b", 8)


def test_layouts_unpack(benchmark: BenchmarkFixture, layouts: list[Layout]) -> None:
    packed = [layout.pack() for layout in layouts]

    def unpack() -> list[Layout]:
        tables: dict[bytes, TensorTable] = {}
        return [Layout.unpack(data, tables) for data in packed]

    assert len(benchmark(unpack)) == len(layouts)


def test_plan(benchmark: BenchmarkFixture, layouts: list[Layout]) -> None:
    plan = benchmark(lambda: plan_push(layouts, slot_bytes=SLOT, owners=OWNERS))
    assert plan.manifest.buckets > 100


def test_manifest_pack_and_unpack(benchmark: BenchmarkFixture, layouts: list[Layout]) -> None:
    manifest = plan_push(layouts, slot_bytes=SLOT, owners=OWNERS).manifest
    assert benchmark(lambda: Manifest.unpack(manifest.pack())).buckets == manifest.buckets


def test_parts_of_a_rank(benchmark: BenchmarkFixture, layouts: list[Layout]) -> None:
    plan = plan_push(layouts, slot_bytes=SLOT, owners=OWNERS)
    assert benchmark(lambda: parts_by_bucket(plan.manifest, layouts[0], plan.fills[0]))
