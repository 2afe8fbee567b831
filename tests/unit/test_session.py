"""One push, rule by rule."""

from __future__ import annotations

from typing import Any

import pytest

from tests.session_world import ERROR, REFUSAL, World, layout_of
from weightsync.session import events as ev
from weightsync.session import instructions as do
from weightsync.session.machine import TRANSITIONS, State
from weightsync.session.tracks import EngineStage

REMOTE = {"a": "home", "b": "away"}


def outcomes(world: World) -> dict[str, str]:
    return {e.name: str(e.stage) for e in world.session.engines.values()}


@pytest.mark.parametrize("buckets", [0, 1, 7])
@pytest.mark.parametrize("pause", ["keep", "none"])
@pytest.mark.parametrize("engines", [{"a": "home", "b": "home"}, REMOTE, {"b": "away"}])
def test_a_push_that_meets_no_trouble_commits_everywhere(buckets, pause, engines):
    world = World(buckets=buckets, pause=pause, engines=engines, owners=2)
    world.open_all()
    world.run()
    assert world.session.state is State.COMMITTED
    assert world.session.done
    assert outcomes(world) == dict.fromkeys(engines, "committed")
    assert all(sorted(m.loaded) == list(range(buckets)) and m.serving for m in world.models.values())
    assert [e.error for e in world.ended] == [None]


def test_every_state_and_event_has_a_row():
    kinds = [k for k in vars(ev).values() if isinstance(k, type) and issubclass(k, ev.Event)]
    assert set(TRANSITIONS) == {(state, kind) for state in State for kind in kinds}


def test_layouts_are_asked_for_once_and_only_where_missing():
    world = World()
    world.open_all()
    plan = next(i for i in world.pending if isinstance(i, do.MakePlan))
    world.pending.remove(plan)
    world.hear(ev.LayoutsMissing(ranks=(1,)))
    assert [i.rank for i in world.pending if isinstance(i, do.AskLayout)] == [1]
    world.run()
    assert world.session.state is State.COMMITTED


@pytest.mark.parametrize(("slots", "owners", "several"), [(3, 2, 3), (3, 1, 2), (2, 1, 1)])
def test_an_engine_that_is_behind_loads_several_buckets_in_one_call_but_not_out_of_all_slots(slots, owners, several):
    world = World(buckets=9, slots=slots, owners=owners, engines={"a": "home"})
    world.open_all()
    first = world.run_until(do.LoadBucket, engine="a")
    assert isinstance(first, do.LoadBucket)
    assert (first.bucket, first.count) == (0, 1)
    while world.leases or len(world.pending) > 1:
        while world.leases:
            world.fill(*world.leases[0])
        for other in [i for i in world.pending if i is not first]:
            world.succeed(other)
    world.succeed(first)
    then = next(i for i in world.pending if isinstance(i, do.LoadBucket))
    assert (then.bucket, then.count) == (1, several)
    assert ("bucket 1" if several == 1 else f"buckets 1 to {several}") in world.session.waiting_for()
    world.run()
    assert world.models["a"].loaded == list(range(9))


def test_an_engine_that_hangs_over_several_buckets_is_given_up_in_time_for_the_others_to_commit():
    world = World(buckets=60, slots=3, owners=8)
    world.open_all()
    while not any(isinstance(i, do.LoadBucket) and i.engine == "a" and i.count > 1 for i in world.pending):
        world.run_some(lambda i: True)
    hung = next(i for i in world.pending if isinstance(i, do.LoadBucket) and i.engine == "a")
    assert hung.count <= do.MOST_LOADED
    assert hung.deadline <= world.now + 10.0, "the time of one operation"
    while world.run_some(lambda i: i is not hung):
        pass
    world.now = hung.deadline
    world.fail(hung, lost=True)
    world.run()
    assert outcomes(world) == {"a": "lost", "b": "committed"}


def test_a_node_that_loads_fewer_buckets_than_it_was_asked_to_is_found_out():
    world = World(buckets=9, slots=6, engines=REMOTE)
    world.open_all()
    while not any(isinstance(i, do.LoadBucket) and i.engine == "b" and i.count > 1 for i in world.pending):
        world.run_some(lambda i: not (isinstance(i, do.LoadBucket) and i.engine == "b") or len(world.pending) == 1)
    asked = next(i for i in world.pending if isinstance(i, do.LoadBucket) and i.engine == "b")
    world.pending.remove(asked)
    world.hear(ev.BucketLoaded(engine="b", bucket=asked.bucket))
    error = world.session.engines["b"].error
    assert error is not None
    assert f"loaded 1 of buckets {asked.bucket} to" in error.message
    world.run()
    assert outcomes(world)["a"] == "committed"


def test_a_node_that_loads_fewer_buckets_than_it_was_asked_to_into_the_last_engine_ends_the_push():
    world = World(buckets=9, slots=6, engines={"b": "away"})
    world.open_all()
    while not any(isinstance(i, do.LoadBucket) and i.count > 1 for i in world.pending):
        world.run_some(lambda i: not isinstance(i, do.LoadBucket) or len(world.pending) == 1)
    asked = next(i for i in world.pending if isinstance(i, do.LoadBucket))
    world.pending.remove(asked)
    world.hear(ev.BucketLoaded(engine="b", bucket=asked.bucket))
    assert world.session.state is State.TORN
    assert "says that it loaded 1 of buckets" in str(world.ended[0].error)


def test_engines_resume_only_when_all_are_verified():
    world = World()
    world.open_all()
    world.run_until(do.VerifyEngine, engine="b")
    world.succeed(next(i for i in world.pending if isinstance(i, do.VerifyEngine) and i.engine == "a"))
    assert not any(isinstance(i, do.ResumeEngine) for i in world.pending)
    world.run()
    assert world.session.state is State.COMMITTED


@pytest.mark.parametrize("served", [2, 3])
def test_a_version_that_does_not_rise_is_refused_before_anything_is_touched(served):
    world = World(served=served)
    world.open_all()
    world.run()
    assert world.session.state is State.ABORTED
    error = world.ended[0].error
    assert error is not None
    assert error.kind == "PushRefused"
    assert f"version {served}" in error.message
    assert not any(m.begun for m in world.models.values())


def test_an_engine_that_refuses_ends_the_push_for_all_before_anything_is_touched():
    world = World()
    world.open_all()
    world.fail(world.run_until(do.AcceptEngine, engine="b"), error=REFUSAL)
    world.run()
    assert world.session.state is State.ABORTED
    assert world.session.done
    error = world.ended[0].error
    assert error is not None
    assert (error.kind, error.engine) == ("PushRefused", "b")
    assert outcomes(world) == {"a": "skipped", "b": "skipped"}


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [(do.ProbeEngine, "skipped"), (do.AcceptEngine, "skipped"), (do.PauseEngine, "skipped"), (do.BeginEngine, "torn"),
     (do.LoadBucket, "torn"), (do.FinishEngine, "torn"), (do.VerifyEngine, "torn"), (do.ResumeEngine, "torn")],
)  # fmt: skip
@pytest.mark.parametrize("lost", [False, True])
def test_one_engine_that_fails_is_out_and_the_other_goes_on(kind, outcome, lost):
    world = World()
    world.open_all()
    world.fail(world.run_until(kind, engine="b"), lost=lost)
    world.run()
    assert world.session.state is State.COMMITTED
    assert world.session.done
    assert outcomes(world) == {"a": "committed", "b": "lost" if lost else outcome}
    assert world.ended[0].error is None


@pytest.mark.parametrize("kind", [do.BeginEngine, do.LoadBucket, do.FinishEngine, do.VerifyEngine])
def test_the_last_engine_that_fails_ends_the_push_torn(kind):
    world = World(engines={"a": "home"})
    world.open_all()
    world.fail(world.run_until(kind, engine="a"))
    world.run()
    assert world.session.state is State.TORN
    assert world.session.torn == ("a",)
    assert world.session.done
    assert world.ended[0].error is not None


@pytest.mark.parametrize("event", [ev.RankFailed(rank=1, error=ERROR), ev.RankLost(rank=1, reason="silence")])
@pytest.mark.parametrize(
    "until",
    [do.ProbeEngine, do.MakePlan, do.AcceptEngine, do.PauseEngine, do.BeginEngine, do.LoadBucket, do.AwaitRelease],
)
def test_a_rank_that_goes_ends_the_push_and_untouched_engines_serve_on(event, until):
    world = World()
    world.open_all()
    world.run_until(until)
    world.hear(event)
    assert world.session.ended
    world.run()
    for rank in range(2):
        world.hear(ev.RankStopped(rank=rank))
    assert world.session.done
    for name, model in world.models.items():
        track = world.session.engines[name]
        if track.touched:
            assert track.stage is EngineStage.TORN
            assert not model.serving
        else:
            assert track.stage is EngineStage.SKIPPED
            assert model.serving, "an engine that was only paused must serve on"


def test_after_everything_is_loaded_the_ranks_are_no_longer_needed():
    world = World()
    world.open_all()
    world.run_until(do.FinishEngine)
    world.hear(ev.RankLost(rank=0, reason="silence"))
    world.run()
    assert world.session.state is State.COMMITTED


def test_a_lost_rank_that_holds_a_lease_may_still_write_so_its_arena_is_replaced():
    world = World()
    world.open_all()
    for _ in range(100):
        if world.leases:
            break
        world.succeed(world.pending[0])
    rank, _ = world.leases[0]
    out = world.session.handle(ev.RankLost(rank=rank, reason="silence"), world.now)
    assert [i.bridge for i in out if isinstance(i, do.RetireBridge)] == [0]


def test_an_unpaused_engine_that_is_torn_is_paused_at_once():
    world = World(pause="none", engines={"a": "home"})
    world.open_all()
    world.fail(world.run_until(do.LoadBucket))
    pauses = [i for i in world.pending if isinstance(i, do.PauseEngine)]
    assert [p.mode for p in pauses] == ["abort"]
    world.run()
    assert not world.models["a"].serving


def test_an_engine_hears_of_a_push_that_does_not_pause_it():
    """Not every engine can load while it serves: its adapter does what comes nearest."""
    world = World(pause="none", engines={"a": "home"})
    world.open_all()
    world.run_until(do.BeginEngine)
    assert ev.EnginePaused(engine="a") in world.history
    assert world.models["a"].serving


def test_a_rank_that_never_opens_is_named_when_time_is_up():
    world = World(world=3)
    world.hear(ev.RankOpened(rank=0, layout=layout_of(0)))
    world.now = world.session.deadline() or 0.0
    world.hear(ev.Tick())
    assert world.session.state is State.ABORTED
    error = world.ended[0].error
    assert error is not None
    assert error.kind == "PushTimeout"
    assert "ranks 1, 2 of 3" in error.message


def test_a_silent_engine_does_not_keep_the_session_from_being_done():
    world = World(engines={"a": "home"})
    world.open_all()
    world.run_until(do.LoadBucket)
    world.now = 100.0
    world.hear(ev.Tick())
    assert world.session.ended
    assert not world.session.done
    world.now = world.session.deadline() or 0.0
    world.hear(ev.Tick())
    assert world.session.done


def test_an_engine_that_left_torn_and_never_answers_is_told_to_pause_all_the_same():
    world = World(engines=REMOTE, pause="none")
    world.open_all()
    load = world.run_until(do.LoadBucket, engine="b")
    world.hear(ev.BridgeLost(node="away", bridge=0, error=ERROR))
    assert outcomes(world)["b"] == "torn"
    world.hear(ev.StopRequested(reason="stopping"))
    world.lose(load)
    world.hear(ev.StopRequested(reason="stopping"))
    assert world.session.done
    assert any(isinstance(i, do.PauseEngine) and i.engine == "b" for i in world.pending)


def test_an_engine_that_left_while_it_was_paused_and_never_answers_is_told_to_resume_all_the_same():
    world = World(engines=REMOTE)
    world.open_all()
    pause = world.run_until(do.PauseEngine, engine="b")
    world.hear(ev.BridgeLost(node="away", bridge=0, error=ERROR))
    world.hear(ev.StopRequested(reason="stopping"))
    world.hear(ev.StopRequested(reason="stopping"))
    assert world.session.done
    world.succeed(next(i for i in world.pending if isinstance(i, do.ResumeEngine) and i.engine == "b"))
    world.succeed(pause)  # of which is heard late
    assert world.models["b"].serving
    world.check_done()


def test_the_home_bridge_that_dies_ends_the_push():
    world = World()
    world.open_all()
    world.run_until(do.LoadBucket)
    world.hear(ev.BridgeLost(node="home", bridge=0, error=ERROR))
    world.run()
    assert world.session.state is State.TORN
    assert world.session.done


def spread(engines: dict[str, str], *, buckets: int = 4, owners: int = 1) -> World:
    """Rank 0 is at home, ranks 1 and 2 are on another node."""
    return World(world=3, places=("home", "away", "away"), engines=engines, buckets=buckets, owners=owners)


@pytest.mark.parametrize("engines", [{"a": "home"}, {"a": "away"}, {"a": "home", "b": "away", "c": "away2"}])
def test_ranks_of_two_nodes_fill_slots_of_their_own_and_every_node_gets_all(engines):
    world = spread(engines, buckets=7, owners=2)
    world.open_all()
    exchange = world.run_until(do.ExchangeBucket)
    assert isinstance(exchange, do.ExchangeBucket)
    assert [slot.node for slot in exchange.slots] == sorted({"home", "away", *engines.values()})
    world.run()
    assert world.session.state is State.COMMITTED
    assert set(outcomes(world).values()) == {"committed"}
    assert not any(isinstance(event, ev.BucketRelayed) and "home" not in event.nodes for event in world.history)


def test_replicas_elsewhere_that_write_nothing_need_no_communicator():
    world = spread({"a": "home"})
    world.plan = tuple(ev.BucketPlan(100, 0, (0,)) for _ in world.plan)
    world.open_all()
    world.run()
    assert world.session.state is State.COMMITTED
    assert not any(isinstance(event, ev.RailsFormed | ev.BucketRelayed) for event in world.history)


@pytest.mark.parametrize("kind", [do.ProbeEngine, do.FormRails, do.LoadBucket])
def test_a_node_with_ranks_that_is_lost_ends_the_push(kind):
    world = spread({"a": "home", "b": "away"})
    world.open_all()
    world.run_until(kind)
    world.hear(ev.NodeLost(node="away", error=ERROR))
    error = world.ended[0].error
    assert error is not None
    assert error.kind == "PushAborted"
    assert "trainer ranks 1, 2 of node away cannot go on: made to fail" in error.message
    world.pending = [i for i in world.pending if getattr(i, "engine", "") != "b"]
    world.run()
    world.hear(ev.RankStopped(rank=0))
    assert world.session.done


def without_slots(world: World, node: str) -> World:
    """Its node was not connected when the push began."""
    world.session.capacity = {place: count for place, count in world.session.capacity.items() if place[0] != node}
    world.session.free = {place: free for place, free in world.session.free.items() if place[0] != node}
    return world


def test_an_engine_of_a_node_that_was_not_connected_is_left_out():
    world = without_slots(World(engines={"a": "home", "b": "away"}), "away")
    world.open_all()
    world.run()
    assert world.session.state is State.COMMITTED
    assert outcomes(world) == {"a": "committed", "b": "skipped"}
    assert "not connected when the push began" in str(world.session.engines["b"].error)


def test_a_node_that_comes_with_a_rank_brings_its_slots():
    world = without_slots(spread({"a": "home"}), "away")
    for rank, node in enumerate(world.places):
        slots = (2,) if node == "away" else ()
        world.hear(ev.RankOpened(rank=rank, layout=layout_of(rank), node=node, slots=slots))
    world.run()
    assert world.session.state is State.COMMITTED


def test_a_communicator_that_was_asked_for_anew_is_waited_for():
    """The bridge at home has died while it was formed: that it failed then says nothing of the nodes."""
    world = spread({"a": "home", "b": "away"})
    world.open_all()
    old = world.run_until(do.FormRails)
    world.hear(ev.BridgeLost(node="home", bridge=0, error=ERROR))
    world.fail(old)
    world.run()
    assert world.session.state is State.COMMITTED
    assert set(outcomes(world).values()) == {"committed"}


def test_a_node_with_ranks_that_no_exchange_reaches_ends_the_push():
    world = spread({"a": "home"})
    world.open_all()
    exchange = world.run_until(do.ExchangeBucket)
    assert isinstance(exchange, do.ExchangeBucket)
    world.pending.remove(exchange)
    world.hear(ev.BucketRelayed(bucket=exchange.bucket, nodes=(), failed=(("away", ERROR),)))
    assert world.session.ended
    assert "node away" in str(world.ended[0].error)


def test_a_rank_of_a_node_that_no_exchange_reaches_writes_until_it_has_stopped():
    world = spread(REMOTE, buckets=2, owners=2)
    world.open_all()
    while not world.leases:
        world.succeed(world.pending[0])
    for lease in [lease for lease in world.leases if lease[1] == 0]:
        world.fill(*lease)
    assert list(world.writing) == [(1, 1)]
    exchange = next(i for i in world.pending if isinstance(i, do.ExchangeBucket))
    world.hear(ev.BridgeLost(node="home", bridge=1, error=ERROR))  # with its slot of bucket 1, not with theirs
    world.pending.remove(exchange)
    world.hear(ev.BucketRelayed(bucket=0, nodes=(), failed=(("away", ERROR),)))
    assert world.session.ended
    while world.pending:
        world.succeed(world.pending[0])
    assert not world.session.done
    world.hear(ev.RankStopped(rank=1))
    assert world.session.done


def test_a_rank_elsewhere_that_is_lost_has_its_own_arena_replaced():
    world = spread({"a": "home"})
    world.open_all()
    world.run_until(do.PauseEngine)
    retired: list[do.Instruction] = world.session.handle(ev.RankLost(rank=1, reason="silence"), world.now)
    (bridge,) = [i for i in retired if isinstance(i, do.RetireBridge)]
    assert (bridge.node, bridge.bridge) == ("away", 0)


def test_a_relay_that_fails_takes_out_the_engines_behind_it_only():
    world = World(engines=REMOTE)
    world.open_all()
    relay = world.run_until(do.RelayBucket)
    assert isinstance(relay, do.RelayBucket)
    world.pending.remove(relay)
    world.hear(ev.BucketRelayed(bucket=relay.bucket, nodes=(), failed=(("away", ERROR),)))
    world.run()
    assert world.session.state is State.COMMITTED
    assert outcomes(world)["a"] == "committed"
    assert outcomes(world)["b"] in ("torn", "skipped", "lost")


def two_relays(world: World) -> list[do.RelayBucket]:
    """Go on with all but broadcasts until nothing else is left to do; those that are under way then."""
    world.open_all()
    for _ in range(500):
        rest = [i for i in world.pending if not isinstance(i, do.RelayBucket)]
        if rest:
            world.succeed(rest[0])
        elif world.leases:
            world.fill(*world.leases[0])
    return [i for i in world.pending if isinstance(i, do.RelayBucket)]


def test_two_broadcasts_of_a_bridge_are_asked_for_at_a_time():
    world = World(buckets=6, slots=4, engines=REMOTE)
    assert [relay.bucket for relay in two_relays(world)] == [0, 1]
    world.run()
    assert world.session.state is State.COMMITTED


@pytest.mark.parametrize("first", [0, 1])
def test_of_two_broadcasts_that_fail_whichever_is_heard_of_first(first):
    """The node is lost to the push once, and the other engines get everything."""
    world = World(buckets=6, slots=4, engines=REMOTE)
    both = two_relays(world)
    for relay in (both[first], both[1 - first]):
        world.pending.remove(relay)
        world.hear(ev.BucketRelayed(bucket=relay.bucket, nodes=(), failed=(("away", ERROR),)))
    world.run()
    assert world.session.state is State.COMMITTED
    assert outcomes(world)["a"] == "committed"
    assert outcomes(world)["b"] in ("torn", "skipped", "lost")
    world.check_done()


def test_a_home_bridge_that_is_lost_with_two_broadcasts_under_way_ends_the_push():
    world = World(buckets=6, slots=4, engines=REMOTE)
    for relay in two_relays(world):
        world.pending.remove(relay)
        world.hear(ev.BridgeLost(node="home", bridge=0, error=ERROR))
    world.run()
    assert world.session.done
    assert world.ended[0].error is not None


def test_a_node_that_is_lost_takes_its_engines_with_it():
    world = World(engines=REMOTE)
    world.open_all()
    world.run_until(do.LoadBucket, engine="b")
    world.hear(ev.NodeLost(node="away", error=ERROR))
    world.pending = [i for i in world.pending if getattr(i, "engine", "") != "b"]
    world.run()
    assert world.session.state is State.COMMITTED
    assert outcomes(world) == {"a": "committed", "b": "lost"}
    assert world.session.done


def test_duplicates_of_every_event_change_nothing():
    plain, doubled = World(engines=REMOTE), World(engines=REMOTE)
    doubled_hear = doubled.hear

    def hear_twice(event: ev.Event) -> None:
        doubled_hear(event)
        doubled_hear(event)

    doubled.hear = hear_twice  # type: ignore[method-assign]
    for world in (plain, doubled):
        world.open_all()
        world.run()
    assert doubled.session.state is State.COMMITTED
    assert doubled.models == plain.models
    assert doubled.session.filled_bytes == plain.session.filled_bytes


def test_a_reader_that_never_lets_go_costs_its_engine_the_push():
    """It may still read a slot that is about to be filled again: what it holds then is nobody's version."""
    world = World(slots=1)
    world.open_all()
    world.fail(world.run_until(do.AwaitRelease, engine="b"))
    world.run()
    assert world.session.state is State.COMMITTED
    assert outcomes(world) == {"a": "committed", "b": "torn"}
    error = world.session.engines["b"].error
    assert error is not None
    assert "never released bucket" in error.message


def test_a_reader_that_read_back_other_bytes_costs_its_engine_the_push():
    world = World(slots=1)
    world.open_all()
    world.fail(world.run_until(do.AwaitRelease, engine="b"), lost=True)
    world.run()
    assert outcomes(world) == {"a": "committed", "b": "torn"}
    error = world.session.engines["b"].error
    assert error is not None
    assert "read back other bytes" in error.message


def test_the_version_of_a_torn_engine_does_not_count():
    """It is a number that nobody found right; the push that mends the engine may carry it again."""
    world = World(engines={"a": "home", "b": "home"})
    world.open_all()
    for probe in [i for i in world.pending if isinstance(i, do.ProbeEngine)]:
        world.pending.remove(probe)
        torn = probe.engine == "a"
        world.hear(ev.EngineProbed(engine=probe.engine, tp_size=1, version=2 if torn else 1, paused=torn, torn=torn))
    world.run()
    assert world.session.state is State.COMMITTED


@pytest.mark.parametrize(
    ("partial", "needs_all", "not_pushed", "refused"),
    [
        (True, True, None, True),
        (True, True, 0, False),  # it has looked: nothing of it is left out
        (True, False, None, False),  # it serves, and keeps what it has of the rest
        (False, True, None, False),
    ],
)
def test_a_part_is_refused_by_who_needs_all_and_cannot_tell_what_that_is(partial, needs_all, not_pushed, refused):
    world = World(world=2, engines={"a": "home", "b": "home"})
    for rank in range(2):
        world.hear(ev.RankOpened(rank=rank, layout=layout_of(rank), node="home", partial=partial and rank == 1))
    accept = world.run_until(do.AcceptEngine, engine="b")
    world.pending.remove(accept)
    world.hear(ev.EngineAccepted(engine="b", not_pushed=not_pushed, needs_all=needs_all))
    world.run()
    assert world.session.state is (State.ABORTED if refused else State.COMMITTED)
    if refused:
        assert world.session.error is not None
        assert world.session.error.kind == "PushRefused"
        assert "engine b is torn or asleep, so it needs the whole model" in world.session.error.message
        assert not any(model.begun for model in world.models.values())


def test_an_engine_that_has_left_answers_while_the_others_commit():
    """Its update has begun, and it serves: it is told to pause whenever that is heard."""
    world = World(world=1, engines={"a": "home", "b": "away"}, buckets=1, pause="none")
    world.open_all()
    begin = world.run_until(do.BeginEngine, engine="b")
    world.hear(ev.BridgeLost(node="away", bridge=0, error=ERROR))
    while str(world.session.state) != "committing":
        world.succeed(next(instruction for instruction in world.pending if instruction is not begin))
    world.succeed(begin)
    assert any(isinstance(i, do.PauseEngine) and i.engine == "b" for i in world.pending)
    world.run()
    assert world.session.state is State.COMMITTED
    world.check_done()


def test_what_is_exported_while_its_node_is_dropped_is_revoked():
    """Its other bridge has died: the export that is under way on this one is for nobody any more."""
    world = World(world=1, engines={"a": "home", "b": "away"}, buckets=1, owners=2)
    world.open_all()
    export = world.run_until(do.ExportBucket, engines=("b",))
    world.hear(ev.BridgeLost(node="away", bridge=1, error=ERROR))
    world.succeed(export)
    assert ("b", 0) not in world.holds
    world.run()
    assert world.session.state is State.COMMITTED
    world.check_done()


def test_a_node_that_was_dropped_before_it_was_lost_is_not_waited_for():
    """What is exported there while it is dropped is never heard of; home's slot of the bucket would be held with it."""
    world = World(world=1, engines={"a": "home", "b": "away"}, buckets=1, owners=2)
    world.open_all()
    export = world.run_until(do.ExportBucket, engines=("b",))
    world.hear(ev.BridgeLost(node="away", bridge=1, error=ERROR))
    world.hear(ev.NodeLost(node="away", error=ERROR))
    for instruction in [export, *(i for i in world.pending if getattr(i, "engine", "") == "b")]:
        world.lose(instruction)
    world.run()
    assert world.session.state is State.COMMITTED
    assert world.session.done, world.session.waiting_for()
    world.check_done()


# --- keepers ----------------------------------------------------------------------------------------------------------


def kept(**more: Any) -> World:
    """The engine `a` serves, `k` keeps."""
    return World(engines={"a": "home", "k": "home"}, keepers=("k",), **more)


def test_what_is_kept_counts_once_an_engine_serves_it():
    world = kept()
    world.open_all()
    resume = world.run_until(do.ResumeEngine, engine="a")
    assert not any(isinstance(i, do.ResumeEngine) and i.engine == "k" for i in world.pending)
    world.succeed(resume)
    world.run()
    assert world.session.state is State.COMMITTED
    assert world.session.committed == ("a",)


def test_what_no_engine_serves_is_not_kept():
    world = kept()
    world.open_all()
    world.fail(world.run_until(do.ResumeEngine, engine="a"))
    world.run()
    assert world.session.state is State.TORN
    assert outcomes(world)["k"] != "committed"
    assert world.ended[0].error is not None
    assert "torn and paused: a" in world.ended[0].error.message
    assert "k" not in world.session.torn


@pytest.mark.parametrize("kind", [do.ProbeEngine, do.AcceptEngine, do.BeginEngine, do.LoadBucket, do.FinishEngine])
def test_a_keeper_that_fails_costs_nobody_the_push(kind):
    world = kept()
    world.open_all()
    refusal = REFUSAL if kind is do.AcceptEngine else ERROR
    world.fail(world.run_until(kind, engine="k"), error=refusal)
    world.run()
    assert world.session.state is State.COMMITTED
    assert outcomes(world)["a"] == "committed"


@pytest.mark.parametrize("kind", [do.AcceptEngine, do.LoadBucket, do.FinishEngine])
def test_without_an_engine_that_serves_a_keeper_keeps_nothing(kind):
    world = kept()
    world.open_all()
    world.fail(world.run_until(kind, engine="a"))
    world.run()
    assert world.session.done
    assert world.session.state in (State.ABORTED, State.TORN)
    assert (world.session.state is State.TORN) == world.models["a"].begun
    assert outcomes(world)["k"] != "committed"


def test_slots_that_hold_a_bucket_are_counted():
    world = World(buckets=4, slots=2)
    assert world.session.taken("home", 0) == 0
    world.open_all()
    world.run_until(do.LoadBucket)
    assert world.session.taken("home", 0) == 2
    world.run()
    assert world.session.taken("home", 0) == 0
    assert world.session.taken("elsewhere", 0) == 0


HOME = {"a": "home", "b": "home"}


@pytest.mark.parametrize("buckets", [1, 5])
def test_engines_that_draw_are_given_no_bucket_and_ranks_no_lease(buckets):
    world = World(buckets=buckets, engines=HOME, draws=("a", "b"))
    world.open_all()
    world.run()
    assert world.session.state is State.COMMITTED
    assert world.drawn == {"a", "b"}
    assert world.released
    assert world.session.filled_bytes == 200, "what ranks expose counts as read"
    assert not any(isinstance(e, ev.RankFilled | ev.BucketLoaded) for e in world.history)


def test_to_one_engine_elsewhere_weights_are_delivered_while_those_beside_the_trainer_draw():
    world = World(engines=REMOTE, draws=("a", "b"))
    world.open_all()
    draw = world.run_until(do.DrawWeights, engine="a")
    while not any(isinstance(i, do.DeliverWeights) for i in world.pending):
        world.succeed(next(i for i in world.pending if i is not draw))
    assert "engine a (draw), b (deliver)" in world.session.waiting_for()
    world.run()
    assert outcomes(world) == dict.fromkeys(REMOTE, "committed")
    assert world.drawn == {"a", "b"}
    assert world.released
    assert not any(isinstance(e, ev.RankFilled | ev.BucketLoaded) for e in world.history)


@pytest.mark.parametrize("how", ["it cannot show its places", "the delivery fails"])
def test_an_engine_that_nothing_can_be_delivered_to_is_given_buckets(how):
    world = World(engines=REMOTE, draws=("a", "b"), unable=("b",) if how.startswith("it") else ())
    world.open_all()
    if not world.unable:
        world.fail(world.run_until(do.DeliverWeights))
    world.run()
    assert outcomes(world) == dict.fromkeys(REMOTE, "committed")
    assert world.drawn == {"a"}
    assert [e.draws for e in world.session.fleet] == [True, False]


def test_what_is_filled_after_a_delivery_that_failed_is_counted_once():
    world = World(engines={"b": "away"}, draws=("b",))
    world.open_all()
    deliver = world.run_until(do.DeliverWeights)
    while world.to_say:
        world.say()
    assert world.session.filled_bytes == 200
    world.fail(deliver)
    assert world.session.filled_bytes == 0
    world.run()
    assert world.session.filled_bytes == sum(100 * len(bucket.fillers) for bucket in world.plan)


SEVERAL = {"a": "home", "b": "away", "c": "away", "d": "away2"}


def test_to_all_engines_elsewhere_it_is_delivered_at_once():
    world = World(engines=SEVERAL, draws=tuple(SEVERAL))
    world.open_all()
    deliver = world.run_until(do.DeliverWeights)
    assert isinstance(deliver, do.DeliverWeights)
    assert (deliver.engines, deliver.nodes) == (("b", "c", "d"), ("away", "away", "away2"))
    world.run()
    assert outcomes(world) == dict.fromkeys(SEVERAL, "committed")
    assert world.drawn == set(SEVERAL)


@pytest.mark.parametrize("terms", [{"draws": ("a", "b", "c")}, {"draws": tuple(SEVERAL), "unable": ("d",)}])
def test_where_one_elsewhere_needs_buckets_all_do(terms):
    world = World(engines=SEVERAL, **terms)
    world.open_all()
    world.run()
    assert outcomes(world) == dict.fromkeys(SEVERAL, "committed")
    assert world.drawn == {"a"}


@pytest.mark.parametrize("kind", [do.ShowPlaces, do.BeginEngine])
def test_one_elsewhere_that_fails_before_the_delivery_is_out_alone(kind):
    world = World(engines=SEVERAL, draws=tuple(SEVERAL))
    world.open_all()
    world.fail(world.run_until(kind, engine="c"))
    world.run()
    assert outcomes(world) == {**dict.fromkeys(SEVERAL, "committed"), "c": "torn"}
    assert world.drawn == {"a", "b", "d"}


def test_slots_are_not_leased_while_a_delivery_to_a_node_that_is_gone_still_uses_them():
    world = World(engines=REMOTE, draws=("a", "b"), unable=("a",))
    world.open_all()
    deliver = world.run_until(do.DeliverWeights)
    while any(i is not deliver for i in world.pending):
        world.succeed(next(i for i in world.pending if i is not deliver))
    world.hear(ev.NodeLost(node="away", error=ERROR))
    assert not world.leases
    assert not world.session.done
    world.fail(deliver)
    world.run()
    assert outcomes(world) == {"a": "committed", "b": "lost"}


def instructions_of(world: World) -> list[do.Instruction]:
    """What the session asks for from here on, as it comes."""
    seen: list[do.Instruction] = []
    take = world._take

    def noting(instructions: list[do.Instruction]) -> None:
        seen.extend(instructions)
        take(instructions)

    world._take = noting  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("who", ["a keeper", "an engine that cannot draw"])
def test_what_was_delivered_is_not_broadcast_for_those_at_home_that_take_buckets(who):
    engines = {"a": "home", "k": "home", "b": "away"}
    keeper = who == "a keeper"
    world = World(
        engines=engines, draws=("a", "k", "b"), keepers=("k",) if keeper else (), unable=() if keeper else ("k",)
    )
    seen = instructions_of(world)
    world.open_all()
    world.run()
    assert outcomes(world) == dict.fromkeys(engines, "committed")
    assert world.drawn == {"a", "b"}
    assert sorted(world.models["k"].loaded) == [0, 1, 2, 3]
    assert not any(isinstance(i, do.RelayBucket) for i in seen)


def test_an_engine_that_was_delivered_to_leaves_with_its_node():
    world = World(engines=REMOTE, draws=("a", "b"), unable=("a",))
    world.open_all()
    world.run_until(do.LoadBucket, engine="a")
    assert world.drawn == {"b"}
    world.hear(ev.NodeLost(node="away", error=ERROR))
    world.run()
    assert outcomes(world) == {"a": "committed", "b": "lost"}


def test_weights_may_not_change_while_a_delivery_to_a_node_that_is_gone_still_reads_them():
    world = World(engines=REMOTE, draws=("a", "b"))
    world.open_all()
    deliver = world.run_until(do.DeliverWeights)
    world.hear(ev.NodeLost(node="away", error=ERROR))
    while world.run_some(lambda i: i is not deliver):
        pass
    assert not world.released
    assert world.session.state is State.TRANSFERRING
    world.fail(deliver)
    world.run()
    assert outcomes(world) == {"a": "committed", "b": "lost"}
    assert world.released


def test_a_delivery_that_is_given_up_may_still_write_so_all_its_arenas_are_replaced():
    world = World(engines=REMOTE, draws=("a", "b"), owners=2)
    world.open_all()
    world.run_until(do.DeliverWeights)
    world.hear(ev.RankFailed(rank=0, error=ERROR))
    seen = instructions_of(world)
    world.now = 1000.0
    world.hear(ev.Tick())
    assert world.session.done
    retired = [(i.node, i.bridge) for i in seen if isinstance(i, do.RetireBridge)]
    assert sorted(retired) == [("away", 0), ("away", 1), ("home", 0), ("home", 1)]


@pytest.mark.parametrize("kind", [do.ShowPlaces, do.DeliverWeights, do.LoadBucket, do.ExportBucket])
def test_work_of_a_node_that_is_lost_counts_no_longer_as_under_way(kind):
    world = World(engines=REMOTE, draws=("a", "b") if kind in (do.ShowPlaces, do.DeliverWeights) else ())
    world.open_all()
    if kind is do.ExportBucket:
        while not any(isinstance(i, kind) and i.slot.node == "away" for i in world.pending):
            world.succeed(world.pending[0]) if world.pending else world.fill(*world.leases[0])
    else:
        world.run_until(kind, **({} if kind is do.DeliverWeights else {"engine": "b"}))
    world.hear(ev.NodeLost(node="away", error=ERROR))  # `validate` has the rest


def test_an_engine_that_is_evicted_while_it_loads_is_counted_as_loading_until_it_answers():
    world = World(engines=HOME)
    world.open_all()
    release = world.run_until(do.AwaitRelease, engine="a", bucket=0)
    load = None
    while load is None:
        world.run_some(lambda i: i is not release)
        load = next((i for i in world.pending if isinstance(i, do.LoadBucket) and i.engine == "a"), None)
    world.fail(release, lost=True)
    assert load in world.pending
    world.succeed(load)
    world.run()
    assert outcomes(world) == {"a": "torn", "b": "committed"}


@pytest.mark.parametrize(("model", "least", "most"), [(1e9, 6.0, 6.0), (400e9, 45.0, 50.0)])
def test_a_delivery_has_time_for_the_size_of_the_model_and_leaves_half_of_the_push(model, least, most):
    world = World(engines=REMOTE, draws=("b",))
    world.plan = tuple(ev.BucketPlan(int(model / 4), 0, (0,)) for _ in range(4))
    world.open_all()
    deliver = world.run_until(do.DeliverWeights)
    assert isinstance(deliver, do.DeliverWeights)
    assert least <= deliver.deadline - world.now <= most


def after_the_last_load(release_of: str = "a", **terms: Any) -> tuple[World, do.AwaitRelease]:
    """A push of which all has ended well that can, but one release."""
    world = World(**{"engines": HOME, **terms})
    world.open_all()
    release = world.run_until(do.AwaitRelease, engine=release_of, bucket=3)
    assert isinstance(release, do.AwaitRelease)
    while any(i is not release for i in world.pending) or world.leases:
        world.run_some(lambda i: i is not release)
    return world, release


def test_an_engine_whose_bytes_may_yet_prove_damaged_is_not_resumed():
    world, release = after_the_last_load()
    assert not any(m.serving for m in world.models.values())
    assert "engine a to release bucket 3" in world.session.waiting_for()
    world.fail(release, lost=True)
    world.run()
    assert outcomes(world) == {"a": "torn", "b": "committed"}
    assert not world.models["a"].serving


@pytest.mark.parametrize("keepers", [(), ("b",)])
def test_engines_resume_once_the_last_bucket_is_given_back(keepers):
    world, release = after_the_last_load("b", keepers=keepers)
    world.succeed(release)
    world.run()
    assert outcomes(world) == {"a": "committed", "b": "committed"}
    assert world.session.done


@pytest.mark.parametrize("keepers", [(), ("b",)])
def test_a_bucket_that_is_never_given_back_costs_the_others_no_more_than_its_time(keepers):
    world, release = after_the_last_load("b", keepers=keepers)
    assert release.deadline <= world.now + 10.0, "the time of one operation"
    world.fail(release)
    world.run()
    assert outcomes(world) == {"a": "committed", "b": "torn"}


def test_with_its_bridge_goes_what_was_waited_for_before_engines_resume():
    world, release = after_the_last_load()
    world.pending.remove(release)
    world.hear(ev.BridgeLost(node="home", bridge=0, error=ERROR))
    world.run()
    assert outcomes(world) == {"a": "committed", "b": "committed"}


def test_an_engine_elsewhere_reads_buckets_once_those_beside_the_trainer_have_drawn():
    world = World(engines=REMOTE, draws=("a",))
    world.open_all()
    draw = world.run_until(do.DrawWeights)
    assert not world.leases, "were it not able to, it would need every bucket"
    world.succeed(draw)
    assert world.leases
    world.run()
    assert outcomes(world) == dict.fromkeys(REMOTE, "committed")
    assert world.drawn == {"a"}


def test_an_engine_that_cannot_draw_after_all_is_given_buckets():
    world = World(engines=HOME, draws=("a", "b"), unable=("b",))
    world.open_all()
    world.run()
    assert outcomes(world) == dict.fromkeys(HOME, "committed")
    assert world.drawn == {"a"}
    assert [e.draws for e in world.session.fleet] == [True, False]


def test_a_rank_that_cannot_expose_its_weights_has_all_go_through_slots():
    world = World(engines=HOME, draws=("a", "b"))
    world.open_all()
    while not world.to_say:
        world.succeed(world.pending[0])
    assert "expose" in world.session.waiting_for()
    world.say()
    world.say(1, problem="no room")
    world.run()
    assert outcomes(world) == dict.fromkeys(HOME, "committed")
    assert world.drawn == set()


def test_ranks_of_other_nodes_expose_nothing():
    world = World(engines=HOME, draws=("a", "b"), places=("home", "away"))
    world.open_all()
    world.run()
    assert outcomes(world) == dict.fromkeys(HOME, "committed")
    assert world.drawn == set()


def test_an_engine_that_fails_as_it_draws_is_torn_and_the_others_go_on():
    world = World(engines=HOME, draws=("a", "b"))
    world.open_all()
    world.fail(world.run_until(do.DrawWeights, engine="a"))
    world.run()
    assert outcomes(world) == {"a": "torn", "b": "committed"}


def test_nothing_is_committed_before_there_is_something_to_compare_it_with():
    world = World(world=1, engines={"a": "home"}, draws=("a",))
    world.open_all()
    while not world.to_say:
        world.succeed(world.pending[0])
    world.say()
    while world.pending:
        world.succeed(world.pending[0])
    assert "fingerprints of rank 0" in world.session.waiting_for()
    world.say()
    world.run()
    assert world.session.state is State.COMMITTED


def test_waiting_for_a_layout_does_not_count_as_planning():
    world = World(world=1)
    world.open_all()
    make = world.run_until(do.MakePlan)
    world.now += 1
    world.pending.remove(make)
    world.hear(ev.LayoutsMissing(ranks=(0,)))
    world.now += 5
    world.hear(ev.LayoutReceived(rank=0))
    make = world.run_until(do.MakePlan)
    world.now += 2
    world.succeed(make)
    assert world.session.phases.seconds["plan"] == 3
    world.run()
    assert world.session.state is State.COMMITTED


def test_filling_counts_from_the_first_lease_to_the_last_word_of_a_rank():
    world = World(world=1, buckets=1, owners=1)
    world.open_all()
    while not world.leases:
        world.succeed(world.pending[0])
    world.now += 4
    world.fill(*world.leases[0])
    world.now += 3
    world.run()
    assert world.session.phases.seconds["fill"] == 4


def test_reading_in_place_counts_as_filling_until_all_is_measured():
    world = World(world=2, draws=("a", "b"), buckets=2)
    world.open_all()
    world.run_until(do.DrawWeights, engine="a")
    world.now += 4
    world.run()
    assert world.session.phases.seconds["fill"] == 4
    assert world.session.state is State.COMMITTED


@pytest.mark.parametrize("broken", ["slot", "phase", "touched", "error"])
def test_a_broken_promise_is_found(broken):
    """What random orders are held against must be able to fail."""
    world = World(world=1, buckets=2)
    world.open_all()
    world.run_until(do.ExportBucket)
    session = world.session
    session.validate()
    if broken == "slot":
        copy = session.buckets[0].copies["home"]
        session.free["home", copy.slot.bridge].append(copy.slot.index)
    elif broken == "phase":
        session.phases.start("verify", world.now)
    elif broken == "touched":
        session.engines["a"].stage = EngineStage.SKIPPED
        session.engines["a"].touched = True
    else:
        session.error = ERROR
    with pytest.raises(AssertionError):
        session.validate()
