"""Whatever happens, in whatever order: a push ends, slots are safe, and no engine serves a mixture."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.session_world import ERROR, REFUSAL, World
from weightsync.session import events as ev
from weightsync.session import instructions as do
from weightsync.session.machine import State
from weightsync.session.tracks import EngineStage

NAMES = st.sampled_from(["a", "b", "c"])
ENGINES = st.sampled_from(
    [  # more often with one elsewhere, which may be delivered to
        {"a": "home"},
        {"a": "home", "b": "home"},
        {"a": "home", "b": "away"},
        {"a": "away", "b": "home"},
        *[{"a": "home", "b": "away", "c": "home"}] * 2,
        {"a": "away", "b": "away2", "c": "home"},
    ]
)
KEEPERS = st.sampled_from([(), (), (), ("b",), ("c",)])  # of those that there are; one engine serves at least


class AnyOrder(RuleBasedStateMachine):
    @initialize(
        world=st.integers(1, 3),
        engines=ENGINES,
        buckets=st.integers(0, 5),
        slots=st.integers(1, 3),
        pause=st.sampled_from(["keep", "none"]),
        owners=st.integers(1, 2),
        torn=st.sampled_from(["", "", "a", "b"]),
        keepers=KEEPERS,
        draws=st.sampled_from([(), ("a",), *[("a", "b"), ("a", "b", "c")] * 3]),
        unable=st.sampled_from([(), (), (), ("a",), ("b",)]),
        frail=st.sampled_from([(), ("a", "b")]),
        places=st.sampled_from([*[()] * 9, ("home", "away"), ("home", "away", "away2"), ("home", "home", "away")]),
        steps=st.integers(0, 90),
        chance=st.none() | st.integers(0, 2**16),
        hung=st.booleans(),
    )
    def begin(self, steps, chance, hung, **terms):
        """In the middle of a push in which all has gone well so far: left to itself, chance hardly ever comes further
        than that all ranks have called. Where deliveries are `hung`, they last longer than that.
        """
        self.world = World(**terms)
        if steps:
            self.world.open_all()
        if chance is None:
            self.world.run(steps)
        else:
            self.world.run_mixed(steps, Random(chance), hung=do.DeliverWeights if hung else None)

    @rule(data=st.data())
    def open_a_rank(self, data):
        rank = data.draw(st.integers(0, self.world.session.world - 1))
        self.world.open(rank)

    @precondition(lambda self: self.world.pending)
    @rule(data=st.data())
    def an_instruction_ends_well(self, data):
        self.world.succeed(data.draw(st.sampled_from(self.world.pending)))

    @precondition(lambda self: self.world.pending)
    @rule(count=st.integers(1, 12))
    def the_oldest_instructions_end_well(self, count):
        for _ in range(count):
            if self.world.pending:
                self.world.succeed(self.world.pending[0])

    @rule(count=st.integers(1, 40), chance=st.integers(0, 2**16))
    def all_goes_well_for_a_while(self, count, chance):
        self.world.run_mixed(count, Random(chance))

    @precondition(lambda self: self.world.delivering)
    @rule()
    def a_node_dies_that_is_delivered_to(self):
        self.world.hear(ev.NodeLost(node="away", error=ERROR))

    @precondition(lambda self: self.world.leases)
    @rule(data=st.data())
    def a_rank_fills(self, data):
        self.world.fill(*data.draw(st.sampled_from(self.world.leases)))

    @precondition(lambda self: self.world.to_say)
    @rule(data=st.data(), problem=st.sampled_from(["", "", "", "no room"]))
    def a_rank_says_where_its_weights_are(self, data, problem):
        self.world.say(data.draw(st.integers(0, len(self.world.to_say) - 1)), problem)

    @precondition(lambda self: self.world.leases)
    @rule()
    def all_ranks_fill(self):
        while self.world.leases:
            self.world.fill(*self.world.leases[0])

    @precondition(lambda self: self.world.pending)
    @rule(data=st.data(), lost=st.booleans())
    def an_instruction_fails(self, data, lost):
        self.world.fail(data.draw(st.sampled_from(self.world.pending)), lost=lost)

    @precondition(lambda self: any(isinstance(i, do.AcceptEngine) for i in self.world.pending))
    @rule(data=st.data())
    def an_engine_refuses(self, data):
        asked = [i for i in self.world.pending if isinstance(i, do.AcceptEngine)]
        self.world.fail(data.draw(st.sampled_from(asked)), error=REFUSAL)

    @precondition(lambda self: any(isinstance(i, do.MakePlan) for i in self.world.pending))
    @rule(data=st.data())
    def layouts_are_missing(self, data):
        self.world.pending.remove(next(i for i in self.world.pending if isinstance(i, do.MakePlan)))
        rank = data.draw(st.integers(0, self.world.session.world - 1))
        self.world.hear(ev.LayoutsMissing(ranks=(rank,)))

    @precondition(lambda self: self.world.pending)
    @rule(data=st.data())
    def an_outcome_is_lost(self, data):
        self.world.lose(data.draw(st.sampled_from(self.world.pending)))

    @precondition(lambda self: self.world.history)
    @rule(data=st.data())
    def an_event_comes_twice(self, data):
        event = data.draw(st.sampled_from(self.world.history))
        if not isinstance(event, ev.BucketRelayed | ev.Tick):
            self.world.hear(event)

    @rule(rank=st.integers(0, 2), lost=st.booleans())
    def a_rank_goes(self, rank, lost):
        if lost:
            self.world.hear(ev.RankLost(rank=rank, reason="silence"))
        else:
            self.world.hear(ev.RankFailed(rank=rank, error=ERROR))

    @rule(rank=st.integers(0, 2))
    def a_rank_has_heard_the_end(self, rank):
        self.world.hear(ev.RankStopped(rank=rank))

    @rule(node=st.sampled_from(["home", "away"]), bridge=st.integers(0, 1))
    def a_bridge_dies(self, node, bridge):
        self.world.hear(ev.BridgeLost(node=node, bridge=bridge, error=ERROR))

    @rule()
    def a_node_dies(self):
        self.world.hear(ev.NodeLost(node="away", error=ERROR))

    @rule(seconds=st.sampled_from([0.1, 5.0, 40.0]))
    def time_passes(self, seconds):
        self.world.now += seconds
        due = self.world.session.deadline()
        if due is not None and self.world.now >= due:
            self.world.hear(ev.Tick())

    @rule()
    def the_daemon_stops(self):
        self.world.hear(ev.StopRequested(reason="stopping"))

    @rule(engine=NAMES, bucket=st.integers(-1, 7), kind=st.sampled_from([ev.BucketLoaded, ev.BucketReleased]))
    def nonsense_about_a_bucket(self, engine, bucket, kind):
        busy = any(
            getattr(i, "engine", "") == engine and getattr(i, "bucket", -1) == bucket
            for i in (*self.world.pending, *self.world.unheard)
        )
        if not busy:  # a forged outcome of an instruction under way is no event that can happen
            before = self.world.session.engines[engine].loaded if engine in self.world.engines else 0
            self.world.hear(kind(engine=engine, bucket=bucket))
            if engine in self.world.engines:
                assert self.world.session.engines[engine].loaded == before

    @invariant()
    def promises_hold(self):
        session = self.world.session
        session.validate()
        due = session.deadline()
        if due is None or self.world.now < due:
            assert not session.handle(ev.Tick(), self.world.now), "what is possible was not asked for at once"
        assert len(self.world.ended) == int(session.ended)
        if session.error is not None and session.error.kind == "PushTimeout":
            assert session.error.phase is not None
        waited_for = [(node, i) for i, bucket in enumerate(session.buckets) for node in bucket.copies]
        assert self.world.gone.isdisjoint(node for node, _ in waited_for), f"a node that is lost has {waited_for}"
        for name, model in self.world.models.items():
            if model.mixed and session.pause != "none":
                assert not model.serving, f"{name} serves a mixture"
        for name, track in session.engines.items():
            model = self.world.models[name]
            if track.stage is EngineStage.COMMITTED:
                assert model.finished
                assert sorted(model.loaded) == list(range(len(self.world.plan)))

    def teardown(self):
        """Time alone ends it, whatever state this run has left it in."""
        if not hasattr(self, "world"):
            return
        session = self.world.session
        for _ in range(3):
            due = session.deadline()
            if due is None:
                break
            self.world.now = max(self.world.now, due)
            self.world.hear(ev.Tick())
        assert session.done
        self.world.check_done()
        assert session.state in (State.COMMITTED, State.ABORTED, State.TORN)
        assert not any(isinstance(i, do.GrantLease) for i in self.world.pending)


AnyOrder.TestCase.settings = settings(max_examples=1200, stateful_step_count=16, deadline=None)
TestAnyOrder = pytest.mark.timeout(300)(AnyOrder.TestCase)
