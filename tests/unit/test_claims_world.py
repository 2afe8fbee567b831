"""Claims of several nodes at once, with real trainers, peers and followers, and time that costs nothing."""

from __future__ import annotations

import asyncio

import pytest

from tests.claims_world import World

pytestmark = pytest.mark.timeout(30)


def test_two_that_wait_for_a_third_do_not_wake_each_other_for_ever():
    """What each has claimed in vain and gives back makes the other try again."""

    async def script(world: World) -> None:
        calls = [world.nodes["c"].call("Z", "first")]
        await asyncio.sleep(0.5)
        calls += [world.nodes["a"].call("X", "second"), world.nodes["b"].call("Y", "third")]
        await asyncio.sleep(8)
        assert world.claims / 8 < 2 * 2 * (20 + 1)  # a second; of two calls, to two nodes each
        await asyncio.sleep(4)
        assert [world.told(call) for call in calls] == [(True, None)] * 3
        world.nothing_is_held()

    both = {"X": "x", "Y": "y"}
    nodes = {name: {model: model + name for model in both} for name in "abc"}
    nodes["c"]["Z"] = "Zc"
    World(nodes, lasts={"Z": 10.0}).run(script)
