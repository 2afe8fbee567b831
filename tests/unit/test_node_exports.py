"""A node's bridges, as a push finds them."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import pytest

from weightsync.errors import TransportTimeout
from weightsyncd.exports import NodeExports


class Bridge:
    """One that is ready, and says when it has answered."""

    def __init__(self) -> None:
        self.offer: bytes | None = b"offer"
        self.answers = 0
        self.answered = asyncio.Event()

    async def prompt(self, *, deadline: float) -> None:
        self.offer = b"offer"
        self.answers += 1
        self.answered.set()


class Slow(Bridge):
    """One that answers when the other has ended."""

    def __init__(self, other: Bridge, ends: int) -> None:
        super().__init__()
        self.other, self.ends = other, ends

    async def prompt(self, *, deadline: float) -> None:
        await self.other.answered.wait()
        if self.answers < self.ends:
            self.other.offer = None
        if time.monotonic() >= deadline:
            raise TransportTimeout("not in time")
        await super().prompt(deadline=deadline)


def prompted(ends: int, seconds: float) -> Bridge:
    async def run() -> Bridge:
        first = Bridge()
        exports = NodeExports("n", "", cast("Any", {}), cast("Any", [first, Slow(first, ends)]))
        await exports.prompt(time.monotonic() + seconds)
        return first

    return asyncio.run(run())


def test_a_bridge_that_ends_while_another_is_waited_for_is_waited_for_anew():
    """The session has planned nothing yet, and has nothing to do with its end: no rank would be told of the plan."""
    first = prompted(ends=1, seconds=20)
    assert (first.offer, first.answers) == (b"offer", 2)


def test_bridges_that_end_one_after_the_other_are_not_waited_for_without_end():
    with pytest.raises(TransportTimeout):
        prompted(ends=1 << 40, seconds=0.2)
