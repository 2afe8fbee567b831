"""What ranks of several nodes write of a bucket."""

from __future__ import annotations

import asyncio

import pytest

from tests.plan_kit import rank
from weightsync.config import ArenaConfig
from weightsync.errors import PushRefused
from weightsync.plan.manifest import Shard
from weightsyncd.plans import Plans


def test_shards_by_columns_between_nodes_that_make_too_many_runs_are_refused():
    """A run for each row and node: what to do instead is said."""
    shape = (70_000, 2)
    columns = [rank(Shard("layers.0.w", "float32", shape, (0, at), (70_000, 1))) for at in (0, 1)]
    plans = Plans(ArenaConfig(slot_bytes=2**20))
    digests = tuple(plans.learn(layout.pack()) for layout in columns)
    with pytest.raises(PushRefused, match=r"140000 separate runs of the bucket that 'layers\.0\.w' is in") as refused:
        asyncio.run(plans.plan(digests, 1, (0, 1)))
    assert "by rows" in (refused.value.hint or "")
    assert asyncio.run(plans.plan(digests, 1, (0, 0))).shares == ()
