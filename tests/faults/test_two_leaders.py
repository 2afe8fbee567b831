"""Trainers on two nodes that are each other's peers push at the same time: of one model, one of them is refused; of two
models, both commit.
"""

from __future__ import annotations

import signal

import pytest

from tests.faults.kit import AT_ONCE
from tests.faults.leaders import MODELS, call, daemons_of
from tests.marks import slow

pytestmark = pytest.mark.faults


def at_once(node, *calls):
    """Both daemons get their calls in the same instant: they stand still while these are made."""
    for daemon in daemons_of(node):
        daemon.kill(signal.SIGSTOP)
    try:
        for one in calls:
            one()
    finally:
        for daemon in daemons_of(node):
            daemon.kill(signal.SIGCONT)


@pytest.mark.parametrize("first", [0, 1])
def test_the_second_of_one_model_is_refused(leaders, first):
    """The first one is in the middle; the other is told who pushes what, at once, and the first commits everywhere."""
    daemons = daemons_of(leaders)
    one, other = leaders.start_ranks(2)
    version = leaders.next_version()
    call(leaders, one, daemons[first], group="one", version=version, gate=["read", 5])
    one.wait_at("read")
    call(leaders, other, daemons[1 - first], group="other")
    error = other.error()
    assert error["kind"] == "PushRefused"
    assert f"version {version} of 'default' by another trainer" in error["message"]
    assert f"node {daemons[first].name}" in error["message"]
    assert error["seconds"] < AT_ONCE
    one.go()
    assert one.report()["complete"]


@pytest.mark.parametrize("round_", [0, *map(slow, (1, 2, 3))])
def test_of_two_that_begin_in_one_instant_one_is_refused(leaders, round_):
    daemons = daemons_of(leaders)
    ranks = leaders.start_ranks(2)

    def calls():
        for i in (0, 1) if round_ % 2 else (1, 0):
            call(leaders, ranks[i], daemons[i], group=f"trainer{i}", gate=["read", 5])

    at_once(leaders, calls)
    results = [rank.result() for rank in ranks]
    stopped = [rank for rank, words in zip(ranks, results, strict=True) if words == {"at": "read"}]
    errors = [words["error"] for words in results if "error" in words]
    assert (len(stopped), [error["kind"] for error in errors]) == (1, ["PushRefused"]), results
    stopped[0].go()
    assert stopped[0].report()["complete"]


@pytest.mark.parametrize("first", [0, slow(1)])
def test_the_second_of_another_model_waits_for_its_turn(leaders, first):
    daemons = daemons_of(leaders)
    one, other = leaders.start_ranks(2)
    call(leaders, one, daemons[first], "default", group="one", gate=["read", 5])
    one.wait_at("read")
    call(leaders, other, daemons[1 - first], "other", group="other")
    one.go()
    assert one.report()["complete"]
    assert other.report()["complete"]


@pytest.mark.parametrize("round_", [0, *map(slow, (1, 2, 3))])
def test_two_models_that_begin_in_one_instant_both_commit(leaders, round_):
    daemons = daemons_of(leaders)
    ranks = leaders.start_ranks(2)

    def calls():
        for i, model in enumerate(MODELS):
            call(leaders, ranks[i], daemons[i ^ (round_ % 2)], model, group=f"trainer{i}")

    at_once(leaders, calls)
    reports = [rank.report() for rank in ranks]
    assert all(report["complete"] for report in reports), reports


# --- trainers with a rank on either node, whose ranks 0 are on different ones ---------------------------------------


def crossed(node, models, name="spread"):
    """The ranks of two such trainers, and what each is to call: a function of its own."""
    daemons, found = daemons_of(node), []
    for i, model in enumerate(models):
        version, ranks = node.next_version(), node.start_ranks(2)
        for number, rank in enumerate(ranks):
            more = {"model": model, "version": version, "group": f"{name}{i}"}
            words = node.terms(number, 2, **more) | {"endpoint": daemons[i ^ number].endpoint}
            found.append((rank, lambda rank=rank, words=words: rank.push(**words)))
    return found


@pytest.mark.parametrize("models", [("default", "other"), ("near", "far")])
def test_spread_trainers_of_two_models_that_begin_in_one_instant_both_commit(leaders, models):
    ranks = crossed(leaders, models)
    at_once(leaders, *(call for _, call in ranks))
    reports = [rank.report() for rank, _ in ranks]
    assert all(report["complete"] for report in reports), reports


def test_spread_trainers_of_one_model_that_begin_in_one_instant_one_is_refused(leaders):
    ranks = crossed(leaders, ("default", "default"))
    at_once(leaders, *(call for _, call in ranks))
    results = [rank.result() for rank, _ in ranks]
    kinds = [words["error"]["kind"] if "error" in words else "report" for words in results]
    assert sorted([kinds[:2], kinds[2:]]) == [["PushRefused"] * 2, ["report"] * 2], results


def test_of_two_that_wait_for_each_others_ranks_one_is_refused(leaders):
    """Each push has begun when the other's second rank calls on its node."""
    (first, call1), (second, call2), (third, call3), (fourth, call4) = crossed(leaders, ("near", "far"), "new")
    call1()
    call3()
    for daemon in daemons_of(leaders):
        leaders.wait_log("opened by", daemon)
    call2()
    call4()
    for rank in (third, fourth):
        error = rank.error()
        assert error["kind"] == "PushRefused", error
        assert f"node {leaders.daemon.name}" in error["message"]
        assert error["seconds"] < AT_ONCE
    assert all(rank.report()["complete"] for rank in (first, second))
