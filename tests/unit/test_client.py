"""What a call of `push_weights` finds wrong by itself, and what it leaves to all ranks to hear."""

from __future__ import annotations

import math
import os
import sys

import numpy as np
import pytest
import torch

from weightsync import push_lora, push_weights
from weightsync.errors import SourceError
from weightsync.sources.undescribed import Undescribed
from weightsync.trainer.arguments import checked_timeout, whole_number
from weightsync.trainer.client import _described, _Weights
from weightsync.trainer.place import trainer_place

NOWHERE = "ipc:///nonexistent/none.sock"


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("version", value) for value in (-1, True, 1.0, "3", None, 2**61, 2**70)),
        *(("timeout", value) for value in (0, -1, math.inf, math.nan, 2e9, 10**400, "3", True, None)),
        *(("model", value) for value in ("", "m" * 257, "\ud800", "a\nb", 5, None)),
    ],
)
@pytest.mark.parametrize("push", [push_weights, push_lora])
def test_what_no_message_can_carry_is_named_at_once(push, argument, value):
    options = {"version": 1, "daemon": NOWHERE, argument: value}
    with pytest.raises(SourceError, match=rf"^{argument} = .* is not a"):
        push({}, **options)


def test_numbers_of_others_are_numbers():
    assert [whole_number("version", value) for value in (np.int64(3), torch.tensor(3), 0, 2**60)] == [3, 3, 0, 2**60]
    assert checked_timeout(np.float32(0.5)) == 0.5


@pytest.mark.parametrize("options", [{}, {"rename": lambda name: 1 / 0}, {"only": "no such tensor"}])
def test_what_cannot_be_described_is_raised_here_or_by_the_push(options):
    """By the push where other ranks would wait for this one."""
    weights = {"a": torch.empty(2, device="cpu" if options else "meta")}
    what = _Weights(weights, None, **options)
    with pytest.raises((SourceError, ZeroDivisionError)) as caught:
        _described(what, None, alone=True)
    source = _described(what, None, alone=False)
    assert isinstance(source, Undescribed)
    assert (source.nbytes, len(source.layout())) == (0, 0)
    with pytest.raises(type(caught.value), match=str(caught.value)[:10]):
        source.measure()


@pytest.mark.parametrize("options", [{}, {"only": "a"}, {"rename": {"a": "b"}}])
def test_a_daemon_is_told_of_tensors_that_were_left_out(monkeypatch, options):
    told = {}

    class Push:
        def __init__(self, source, **terms):
            told.update(terms)

        def run(self):
            pass

    monkeypatch.setattr("weightsync.trainer.rank.RankPush", Push)
    push_weights({"a": torch.zeros(2), "c": torch.zeros(2)}, version=1, daemon=NOWHERE, **options)
    assert told["partial"] == ("only" in options)


# --- who takes whom for a rank of the same trainer --------------------------------------------------------------------


class Launched:
    """As much of torch.distributed as says which rank this is."""

    group = type("group", (), {"WORLD": None})

    def __init__(self, world: int) -> None:
        self.world = world

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def get_rank(self, group: object) -> int:
        return 0

    def get_process_group_ranks(self, group: object) -> list[int]:
        return list(range(self.world))


@pytest.mark.parametrize(("address", "apart"), [("127.0.0.1", True), ("localhost", True), ("10.0.0.7", False)])
def test_trainers_whose_masters_are_on_loopback_are_of_their_machine(monkeypatch, address, apart):
    """Every machine has a 127.0.0.1:29500; one job over several machines has none."""
    monkeypatch.setitem(sys.modules, "torch.distributed", Launched(2))
    monkeypatch.delenv("WEIGHTSYNC_TRAINER", raising=False)
    for name, value in (("TORCHELASTIC_RUN_ID", "none"), ("MASTER_ADDR", address), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    groups = []
    for host in ("a", "b"):
        monkeypatch.setattr("weightsync.trainer.place.socket.gethostname", lambda host=host: host)
        groups.append(trainer_place().group)
    assert (groups[0] != groups[1]) == apart


def test_forked_trainers_of_one_rank_are_trainers_of_their_own(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.distributed", Launched(1))
    mine = trainer_place().group
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert trainer_place().group != mine
