"""Ranks and engines that fail while engines read the trainer's own memory."""

from __future__ import annotations

import signal

import pytest

from tests.faults.kit import engine_processes, until
from tests.faults.test_engines import error_of, outcomes, start

pytestmark = pytest.mark.faults


def push_all(node, ranks, **more):
    node.push_all(ranks, node.next_version(), in_place=True, **more)


def wait_drawing(node, engine):
    node.wait_waiting_for(f"{engine.name} (draw)")


@pytest.mark.parametrize("victim", [0, 1])
def test_an_engine_that_fails_as_it_draws_is_torn_and_the_other_goes_on(node, victim):
    broken, well = node.engines[victim], node.engines[1 - victim]
    node.order(broken, fail={"endpoint": "/draw"})
    report = start(node, in_place=True).report()
    assert outcomes(report) == {broken.name: ("torn", None), well.name: ("committed", report["version"])}
    error = error_of(report, broken.name)
    assert (error["engine"], error["phase"]) == (broken.name, "draw")
    node.serves(well, "C")
    node.does_not_serve(broken)


@pytest.mark.parametrize("part", ["front", "worker"])
def test_an_engine_that_is_killed_as_it_draws_is_lost(node, part):
    well, dead = node.engines
    node.delay(dead, "/draw")
    rank = start(node, in_place=True)
    wait_drawing(node, dead)
    processes = engine_processes(dead)
    processes[0 if part == "front" else 2].kill()
    report = rank.report()
    assert outcomes(report) == {dead.name: ("lost", None), well.name: ("committed", report["version"])}
    dead.process.wait(10)
    until(lambda: not any(p.is_running() for p in processes[1:]), "nothing of it is left")
    node.fleet.restart_engine(dead)


def test_a_worker_that_is_stopped_as_it_draws_holds_up_its_own_engine_only(node):
    well, stopped = node.engines
    worker = engine_processes(stopped)[2]
    node.delay(stopped, "/draw")
    rank = start(node, in_place=True)
    wait_drawing(node, stopped)
    worker.suspend()
    node.clear()
    report = rank.report()
    assert outcomes(report) == {stopped.name: ("lost", None), well.name: ("committed", report["version"])}
    worker.resume()
    node.does_not_serve(stopped)


@pytest.mark.parametrize("read", [0, 9])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_before_it_has_exposed_everything_leaves_engines_untouched(node, victim, read):
    ranks = node.start_ranks(2)
    push_all(node, ranks, only={victim: {"gate": ["read", read]}})
    ranks[victim].wait_at("read")
    ranks[victim].kill()
    error = ranks[1 - victim].error()
    assert (error["kind"], error["rank"], error["phase"]) == ("PushAborted", victim, "fill")
    assert error["seconds"] < 10
    assert node.torn_or_whole(node.before) == set()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_goes_while_engines_draw_tears_those_that_began(node, victim, number):
    ranks = node.start_ranks(2)
    for engine in node.engines:
        node.delay(engine, "/draw")
    push_all(node, ranks)
    for engine in node.engines:
        wait_drawing(node, engine)
    ranks[victim].kill(number)
    error = ranks[1 - victim].error()
    assert (error["kind"], error["rank"]) == ("PushAborted", victim)
    assert error["seconds"] < 10
    node.clear()
    node.wait_idle()
    assert node.torn_or_whole(node.before) == {engine.name for engine in node.engines}
    if number == signal.SIGSTOP:
        ranks[victim].kill(signal.SIGKILL)


def test_an_engine_slower_than_its_deadline_is_lost_and_draws_nothing_later(node):
    well, slow = node.engines
    node.delay(slow, "/draw")
    report = start(node, in_place=True).report()
    assert outcomes(report) == {slow.name: ("lost", None), well.name: ("committed", report["version"])}
    assert "draw" in error_of(report, slow.name)["phase"]
    node.clear()
    node.does_not_serve(slow)


def test_a_rank_that_is_slow_to_expose_is_named_when_time_is_up(node):
    ranks = node.start_ranks(2)
    node.push_once(ranks, in_place=True)
    push_all(node, ranks, timeout=2.0, only={0: {"gate": ["read", 3]}})
    error = ranks[1].error()
    assert (error["kind"], error["rank"], error["phase"]) == ("PushTimeout", 0, "fill")
    assert "rank 0 to expose its weights" in error["message"]
    ranks[0].wait_at("read")
    ranks[0].go()
    ranks[0].error()
    assert node.torn_or_whole(node.before) == set()
