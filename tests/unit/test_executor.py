"""Instructions for engines, carried out: several buckets in one call, and which of them is to blame."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import pytest

from weightsync.adapters.base import EngineAdapter
from weightsync.config import EngineConfig
from weightsync.errors import EngineError
from weightsync.session import events as ev
from weightsync.session import instructions as do
from weightsyncd.context import PushContext
from weightsyncd.engines import Engine
from weightsyncd.executor import NodeExecutor


class Hand:
    """As much of an adapter as loads: one that is told of one bucket at a time."""

    load_several: Any = EngineAdapter.load_several

    def __init__(self, *, breaks_at: int = -1, names_it: bool = True) -> None:
        self.loaded: list[int] = []
        self._breaks_at, self._names_it = breaks_at, names_it

    async def load(self, bucket: int, tickets: Any, *, deadline: float) -> None:
        if bucket == self._breaks_at:
            raise EngineError("it broke", bucket=bucket if self._names_it else None)
        self.loaded.append(bucket)


class AtOnce(Hand):
    async def load_several(self, first: int, tickets: Any, *, deadline: float) -> None:
        self.loaded += range(first, first + len(tickets))


def carried_out(hand: Hand, instruction: do.LoadBucket, exported: range) -> ev.Event | None:
    async def run() -> ev.Event | None:
        engine = Engine(EngineConfig(name="e", kind="reference", url="http://127.0.0.1:1"), cast("Any", hand))
        executor = NodeExecutor("n", "", cast("Any", {"e": engine}), [])
        context = PushContext(push="p", model="m", version=3)
        context.tickets = {("e", bucket): (b"ticket",) for bucket in exported}
        return await executor.execute(context, instruction)

    return asyncio.run(run())


def load(first: int, count: int) -> do.LoadBucket:
    return do.LoadBucket(engine="e", bucket=first, count=count, deadline=time.monotonic() + 20)


@pytest.mark.parametrize("kind", [Hand, AtOnce])
def test_several_buckets_are_loaded_in_their_order(kind):
    hand = kind()
    assert carried_out(hand, load(4, 3), range(2, 9)) == ev.BucketLoaded(engine="e", bucket=4, count=3)
    assert hand.loaded == [4, 5, 6]


def test_nothing_is_loaded_if_one_of_them_was_not_exported():
    hand = Hand()
    failed = carried_out(hand, load(4, 3), range(2, 6))
    assert isinstance(failed, ev.EngineFailed)
    assert failed.error.message.startswith("buckets 4 to 6 were not exported")
    assert hand.loaded == []


def test_the_bucket_that_broke_it_is_named():
    failed = carried_out(Hand(breaks_at=6), load(4, 3), range(2, 9))
    assert isinstance(failed, ev.EngineFailed)
    assert (failed.error.message, failed.error.bucket) == ("it broke", 6)


def test_where_nobody_knows_which_broke_it_all_are():
    failed = carried_out(Hand(breaks_at=6, names_it=False), load(4, 3), range(2, 9))
    assert isinstance(failed, ev.EngineFailed)
    assert (failed.error.message, failed.error.bucket) == ("it broke (buckets 4 to 6)", None)
    failed = carried_out(Hand(breaks_at=6, names_it=False), load(6, 1), range(2, 9))
    assert isinstance(failed, ev.EngineFailed)
    assert (failed.error.message, failed.error.bucket) == ("it broke", 6)
