"""What touches a box is found, however boxes came to lie in a memory."""

from __future__ import annotations

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from weightsync.replay.strided import Box
from weightsync.replay.written import WrittenBox, WrittenBoxes

BOXES = st.builds(
    lambda at, size, step: Box(4 * at, (size,), (4 * step,)), st.integers(0, 60), st.integers(1, 6), st.integers(1, 3)
)


def written(number: int, box: Box) -> WrittenBox:
    return WrittenBox(str(number), box, box, torch.float32, torch.float32)


@given(st.lists(BOXES, max_size=12), st.lists(BOXES, max_size=2), BOXES)
@example([Box(4 * at, (1,), (4,)) for at in (0, 2, 1, 0)], [], Box(4, (2,), (4,)))  # those it asks for lie apart
def test_those_that_touch_are_all_found_and_the_latest_last(boxes, forgotten, asked):
    kept, plain = WrittenBoxes(), []
    for number, box in enumerate(boxes):
        kept.add([written(number, box)])
        plain.append(written(number, box))
    for box in forgotten:
        kept.forget(box, 4)
        plain = [one for one in plain if not one.touches(box, 4)]
    wanted = [one for one in plain if one.touches(asked, 4)]
    found = kept.touching(asked, 4)
    assert sorted(found) == sorted(wanted)
    over = any(a.touches(b.own, 4) for i, a in enumerate(wanted) for b in wanted[i + 1 :])
    assert not over or found[-1] == wanted[-1]
    assert sorted(kept) == sorted(plain)
    assert bool(kept) == bool(plain)


def test_those_that_lie_side_by_side_are_found_without_a_look_at_the_others(monkeypatch):
    kept = WrittenBoxes()
    kept.add(written(n, Box(8 * n, (2,), (4,))) for n in reversed(range(1000)))
    monkeypatch.setattr(WrittenBox, "touches", lambda *_: 1 / 0)
    assert [one.name for one in kept.touching(Box(8 * 500 + 4, (2,), (4,)), 4)] == ["500", "501"]
