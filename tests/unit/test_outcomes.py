"""What a push came to."""

from __future__ import annotations

import pytest

from weightsync.session.tracks import EngineTrack
from weightsyncd.outcomes import brought_all


@pytest.mark.parametrize(
    ("not_pushed", "partial", "whole"),
    [
        ([0, 0], False, True),
        ([0, 0], True, True),  # what was left out is nothing that engines have
        ([0, 3], False, False),
        ([None, 0], False, True),
        ([None, 0], True, False),  # nobody knows whether it has what was left out
        ([None, 3], False, False),
    ],
)
def test_a_push_that_may_have_left_something_out_is_not_kept_as_whole(not_pushed, partial, whole):
    engines = [EngineTrack(name=f"e{i}", node="n", not_pushed=left) for i, left in enumerate(not_pushed)]
    assert brought_all(engines, partial=partial) is whole
