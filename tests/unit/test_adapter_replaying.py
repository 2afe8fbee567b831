"""What may come unchecked, and that it is compared, whatever the engine's brand."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.hand_push import manifest_of, soon
from weightsync.adapters.held import HeldSums
from weightsync.adapters.sglang.control import SGLangAdapter
from weightsync.adapters.sglang.path_plugin import PluginPath
from weightsync.adapters.vllm.control import VLLMAdapter
from weightsync.adapters.vllm.path_plugin import ExtensionPath
from weightsync.engine_config import EngineConfig
from weightsync.errors import EngineError
from weightsync.plan.replay_facts import ReplayFacts

MANIFEST = manifest_of({"w": ("float32", (4,), bytes(16))}, slot_bytes=64)
EXPECTED = np.zeros(1, np.uint64)
COMPARES = ReplayFacts(phase="replay", compares=True)


@pytest.fixture(params=["vllm", "sglang"])
def hand(request: pytest.FixtureRequest) -> Any:
    """One whose last push compared every tensor, and whose workers have nothing to say any more."""
    server: Any = SimpleNamespace(engine="e")
    spec = EngineConfig(name="e", kind=request.param, url="http://127.0.0.1:1")
    made: Any
    if request.param == "vllm":
        made, path = VLLMAdapter(spec), ExtensionPath(server, draft=False)
        made._path = path
    else:
        made, path = SGLangAdapter(spec), PluginPath(server, SimpleNamespace(sessions=False), "all", 1)  # type: ignore
        made._known = SimpleNamespace(path=path)

    async def sums(*_: Any, **__: Any) -> list[HeldSums]:
        made.asked += 1
        return [HeldSums()]

    made.asked, made.way, path.replay, path.sums = 0, path, COMPARES, sums  # type: ignore[method-assign]
    made._held._whole.add(MANIFEST.digest)
    return made


def verify(hand: Any) -> Any:
    return asyncio.run(hand.verify(MANIFEST, EXPECTED, deadline=soon()))


def test_an_update_is_unchecked_where_all_was_compared(hand):
    assert hand.draws(MANIFEST)
    assert hand._unchecked(MANIFEST) == (True, False)
    hand._held.doubtful = True
    assert hand._unchecked(MANIFEST) == (True, True)
    hand.way.replay = None  # it has restarted
    assert not hand.draws(MANIFEST)
    assert hand._unchecked(MANIFEST) == (False, False)
    assert (verify(hand), hand.asked) == (None, 0)


def test_a_push_that_nobody_compared_is_followed_by_one_that_is_checked(hand):
    replay, hand.way.replay = hand.way.replay, None
    hand._unchecked(MANIFEST)
    assert verify(hand) is None
    hand.way.replay = replay  # its workers can tell by now, of what they loaded through their loader
    assert not hand.draws(MANIFEST)


def test_what_came_unchecked_is_asked_for_whatever_workers_say_by_then(hand):
    hand._unchecked(MANIFEST)
    hand.way.replay = None
    assert (verify(hand), hand.asked) == (None, 1), "they checked it all after all"
    hand._drawn = True
    with pytest.raises(EngineError, match="pulled its weights unchecked"):
        verify(hand)


def test_another_way_in_neither_draws_nor_verifies(hand):
    hand._path = hand._known = None

    async def asked() -> tuple[str, object]:
        exposures: Any = None
        return await hand.draw(exposures, deadline=soon()), await hand.places(deadline=soon())

    assert asyncio.run(asked()) == ("this engine has no way to it",) * 2
    assert not hand.draws(MANIFEST)
    assert verify(hand) is None
