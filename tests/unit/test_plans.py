"""What a daemon remembers of layouts."""

from __future__ import annotations

import asyncio

from tests.plan_kit import rank, rows
from weightsync.config import ArenaConfig
from weightsyncd import plans as module
from weightsyncd.plans import Plans


def test_a_trainer_of_more_ranks_than_layouts_are_kept_is_planned(monkeypatch):
    """Each layout that is learned must not make it forget another that is needed."""
    monkeypatch.setattr(module, "_LAYOUTS", 4)
    layouts = [rank(rows("w", (6, 2), at, at + 1)) for at in range(6)]
    digests = tuple(layout.digest for layout in layouts)
    plans = Plans(ArenaConfig(slot_bytes=2**20))
    plans.learn(layouts[3].pack())
    for other in range(3):  # of another trainer, learned since
        plans.learn(rank(rows("other", (3, 2), other, other + 1)).pack())
    asked = []
    while missing := plans.missing(digests, 1, (0,) * 6):
        asked.append(missing)
        assert len(asked) <= 3
        for each in missing:
            assert plans.learn(layouts[each].pack(), world=6) == digests[each]
    assert asyncio.run(plans.plan(digests, 1, (0,) * 6)).manifest.tensors.names == ("w",)
