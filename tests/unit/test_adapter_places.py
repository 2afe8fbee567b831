"""What ranks answer of their places, whole or by digest, and what the daemon makes of it."""

from __future__ import annotations

import os

import pytest

from weightsync.adapters.places import Shown, ToldPlaces, shown
from weightsync.errors import EngineError
from weightsync.plan.exposure import Exposure, Exposures, Region
from weightsync.plan.packing import DIGEST_BYTES
from weightsync.plan.replay_facts import LAYOUTS


def places(rank: int, layout: int = 0) -> Exposure:
    region = Region(nbytes=1 + layout, fd=rank, name="weightsync-0")
    return Exposure.of(os.getpid(), "1", [region], [], 1)


def test_a_rank_tells_by_digest_what_the_daemon_knows():
    told, ranks = ToldPlaces("e"), [places(0), places(1)]
    whole = Exposures.of([rank.packed for rank in ranks])
    for known in ([], sorted(rank.digest for rank in ranks)):
        assert told.known == known
        answers = [shown(rank, told.known).pack() for rank in ranks]
        assert (max(map(len, answers)) < 2 * DIGEST_BYTES) == bool(known)
        assert told.of(answers, 2) == whole
    ranks[1] = places(1, 1)
    found = told.of([shown(rank, told.known).pack() for rank in ranks], 2)
    assert found == Exposures.of([rank.packed for rank in ranks])


def test_a_few_are_remembered():
    told = ToldPlaces("e")
    for layout in range(LAYOUTS + 1):
        told.of([shown(places(0, layout), told.known).pack()], 1)
    assert len(told.known) == LAYOUTS
    assert places(0).digest not in told.known


def test_the_reason_of_one_rank_is_that_of_all():
    told = ToldPlaces("e")
    answers = [shown(places(0), ()).pack(), shown("it has none", ()).pack()]
    assert told.of(answers, 2) == "tp rank 1: it has none"


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ([Shown(bytes(DIGEST_BYTES)).pack()], "tp rank 0 of engine e speaks of places that it never told: 0000"),
        ([b"\xc1"], "tp rank 0 of engine e answered in a way that is none of ours"),
        ([], "0 of the 1 tp ranks of engine e say where"),
    ],
)
def test_what_is_no_answer_names_its_rank(answers, why):
    with pytest.raises(EngineError, match=why):
        ToldPlaces("e").of(answers, 1)
