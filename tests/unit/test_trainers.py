"""Calls of push_weights that come to nothing before there is a push."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.wire_examples import EXAMPLES
from weightsync.config import parse_node_config
from weightsync.wire import messages as msg
from weightsyncd.engines import Engines
from weightsyncd.metrics import Metrics
from weightsyncd.trainers import Trainers

CONFIG = parse_node_config(
    '[[engines]]\nname = "e0"\nkind = "reference"\nurl = "http://127.0.0.1:9"\nmodel = "policy"\n'
)
(OPEN,) = [example for example in EXAMPLES if isinstance(example, msg.Open)]
CALL = msgspec.structs.replace(OPEN, rank=0, world=1, model="policy")


class World:
    """The trainers of a node whose one engine serves `policy`, and what ranks were told."""

    def __init__(self) -> None:
        self.metrics = Metrics(["policy"])
        self.told: list[msg.Message] = []
        self.follower = SimpleNamespace(
            branch=None, following=None, holder=None, known=False, branch_for=lambda *_: None
        )
        services: Any = SimpleNamespace(
            config=CONFIG,
            peers={},
            executor=SimpleNamespace(engines=Engines(CONFIG.engines, CONFIG.timeouts, busy=lambda: False)),
            send=lambda _, message: self.told.append(message),
        )
        follower: Any = self.follower
        self.trainers = Trainers(services, self.metrics, follower, lambda: None)

    def call(self, **changes: object) -> None:
        self.trainers.open(b"rank", msgspec.structs.replace(CALL, **changes))

    @property
    def failures(self) -> dict[tuple[str, str], float]:
        """(model, kind) → how often, those of never left out."""
        (family,) = [f for f in self.metrics.registry.collect() if f.name == "weightsync_push_failures"]
        totals = [s for s in family.samples if s.name.endswith("_total") and s.value]
        return {(s.labels["model"], s.labels["kind"]): s.value for s in totals}


def test_callers_cannot_make_metrics_grow():
    world = World()
    for number in range(3):
        world.call(model=f"typo-{number}")
    assert world.failures == {("unknown", "PushRefused"): 3}
    first = {"model": "unknown", "kind": "PushTimeout"}
    assert world.metrics.registry.get_sample_value("weightsync_push_failures_total", first) == 0  # the next is a rise


def test_a_refusal_is_kept_for_whoever_looks_at_the_status():
    world = World()
    world.call(model="typo", version=5)
    (_, ended) = world.told
    assert isinstance(ended, msg.Ended)
    error = world.trainers.refusals.last
    assert error is not None
    assert error == ended.error
    assert (error.kind, error.model, error.version) == ("PushRefused", "typo", 5)
    assert "no engine serves model 'typo'" in error.message
    assert error.hint == "models known here: policy"
    assert world.trainers.last_error is None  # that is of pushes


def test_a_call_that_waits_in_vain_is_kept_too():
    world = World()
    world.follower.following = "n1-ab"
    world.call(timeout=0.0)
    world.trainers.check_alive(5.0)
    assert world.failures == {("policy", "PushTimeout"): 1}
    assert world.trainers.refusals.last is not None
    assert "waiting for push n1-ab of another node" in world.trainers.refusals.last.message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engines": ("e9",)}, "has no engine called e9"),
        ({"engines": ("e0",)}, "no engine is behind version 3 any more"),
    ],
)
def test_a_keeper_that_is_refused_is_no_failure_of_a_trainer(changes, words):
    """It tries again, and its log says so."""
    world = World()
    world.call(**changes)
    ended = world.told[-1]
    assert isinstance(ended, msg.Ended)
    assert ended.error is not None
    assert words in ended.error.message
    assert world.failures == {}
    assert world.trainers.refusals.last is None
