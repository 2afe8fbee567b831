"""Requests that run in the engines while a push comes by: what each pause mode does to them, token by token."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.faults.kit import PROMPT, engine_processes, until
from weightsync.adapters.reference.model import load_checkpoint

pytestmark = pytest.mark.faults

MOST = {1: 3000, 2: 500}  # by tensor-parallel size; tokens: two seconds or more of decoding, on an idle machine
LONG: dict[int, int] = {}  # as many or, where decoding is slower, those of three seconds; see `how_long`
LASTS = 120.0  # seconds, the most for one request
TAIL = 8  # tokens
SHORT = {1: TAIL, 2: TAIL}
CLOSE = 1e-4  # the most by which the logit of a greedy token may miss the highest, between two ways of adding up


@functools.cache
def _model(checkpoint):
    return load_checkpoint(checkpoint)


def likely(node, name, tokens):
    """For each token after the prompt: whether checkpoint `name` would have chosen it."""
    with torch.no_grad():
        logits = _model(node.checkpoint(name))(torch.tensor([PROMPT + tokens]))[0]
    before = logits[len(PROMPT) - 1 : -1]
    chosen = before.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    verdict: list[bool] = (chosen > before.max(1).values - CLOSE).tolist()
    return verdict


def all_of(node, name, tokens):
    return all(likely(node, name, tokens))


def changed_over(node, old, new, tokens):
    """Whether the tokens are of `old` up to one of them, and from there on of `new`, and neither explains them all."""
    by_old, by_new = likely(node, old, tokens), likely(node, new, tokens)
    if all(by_old) or all(by_new):
        return False
    return all(by_new[by_old.index(False) :])


class Flights:
    """Requests under way; each of them has begun to run when `start` returns."""

    def __init__(self, node, pool):
        self._node, self._pool = node, pool
        self._begun = {}  # engine → requests

    def start(self, engine, max_tokens):
        body = {"prompt_ids": PROMPT, "max_tokens": max_tokens}
        others = self._begun.setdefault(engine.name, [])
        flight = self._pool.submit(self._node.post, engine, "/generate", body, LASTS)

        def runs():
            before = sum(not other.done() for other in others)  # counted first: one of them may just be ending
            return flight.done() or self._node.info(engine)["running"] > before

        until(runs, "the request runs")
        assert not flight.done(), flight.result().text
        others.append(flight)
        return flight

    def start_all(self, lengths=LONG):
        """One at each engine; where decoding is slow first."""
        begun = {e.name: self.start(e, lengths[e.tp]) for e in sorted(self._node.engines, key=lambda e: -e.tp)}
        return [begun[engine.name] for engine in self._node.engines]


def how_long(node, engine):
    """The quickest of some, since the machine may stand still in one of them."""
    body, took = {"prompt_ids": PROMPT, "max_tokens": 64}, []
    for _ in range(5):
        start = time.monotonic()
        node.post(engine, "/generate", body, LASTS).raise_for_status()
        took.append(time.monotonic() - start)
    return min(MOST[engine.tp], int(64 * 3.0 / min(took)))


@pytest.fixture
def flights(node):
    if not LONG:
        LONG.update({engine.tp: how_long(node, engine) for engine in node.engines})
    with ThreadPoolExecutor(8) as pool:
        yield Flights(node, pool)
        node.clear()
        for engine in node.engines:  # a test that failed must not wait for what it has left
            if node.info(engine)["running"]:
                node.post(engine, "/pause", {"mode": "abort"})


def landed(flight, reason="length"):
    """Its tokens, once it has ended for this reason."""
    answer = flight.result(LASTS + 20).raise_for_status().json()
    assert answer["finish_reason"] == reason
    tokens: list[int] = answer["token_ids"]
    return tokens


def whole(node, flights):
    """The tokens of each engine's long request, which got all that it asked for."""
    found = [landed(flight) for flight in flights]
    assert [len(tokens) for tokens in found] == [LONG[engine.tp] for engine in node.engines]
    return found


def begin_push(node, read, **terms):
    """A push of checkpoint C by one rank, which will stand before this read; None: which it will not."""
    (rank,) = node.start_ranks(1)
    gate = {} if read is None else {"gate": ["read", read]}
    rank.push(**node.terms(0, 1, **{"version": node.next_version(), **gate, **terms}))
    return rank


def push_to(node, read, **terms):
    """The same, once it stands there and engines are as it leaves them until then."""
    rank = begin_push(node, read, **terms)
    if read is not None:
        rank.wait_at("read")
        if read or terms.get("pause") != "none":
            wait_all(node, "torn" if read else "paused")
    return rank


def wait_all(node, what):
    until(lambda: all(node.info(engine)[what] for engine in node.engines), f"both engines are {what}")


@contextlib.contextmanager
def standing(node):
    """One worker of each engine stands still: its requests run on afterwards, and end in their own time."""
    workers = [engine_processes(engine)[1] for engine in node.engines]
    for worker in workers:
        worker.suspend()
    try:
        yield
    finally:
        for worker in workers:
            worker.resume()


@pytest.mark.parametrize("read", [0, 9])
def test_keep_holds_requests_and_they_go_on_with_the_new_weights(node, flights, read):
    running = flights.start_all()
    rank = push_to(node, read, pause="keep")
    late = flights.start_all(SHORT)  # they come while it is paused, and wait
    assert all(node.info(engine)["running"] == 2 for engine in node.engines)
    rank.go()
    assert rank.report()["complete"]
    for tokens in whole(node, running):
        assert changed_over(node, node.before, "C", tokens)
    for flight in late:
        assert all_of(node, "C", landed(flight))
    for engine in node.engines:
        node.serves(engine, "C")


def test_wait_lets_requests_end_first(node, flights):
    with standing(node):
        running = flights.start_all(SHORT)
        version = node.next_version()
        rank = begin_push(node, 0, version=version, pause="wait")
        for engine in node.engines:
            node.wait_log(f"[engine={engine.name} v={version}] pause.started")
        assert not any(flight.done() for flight in running)
    rank.wait_at("read")
    wait_all(node, "paused")
    for engine, flight in zip(node.engines, running, strict=True):
        assert node.info(engine)["running"] == 0
        tokens = landed(flight)
        assert len(tokens) == SHORT[engine.tp]
        assert all_of(node, node.before, tokens)
        refused = node.post(engine, "/generate", {"prompt_ids": PROMPT, "max_tokens": 1})
        assert (refused.status_code, refused.json()["error"]) == (503, "the engine is paused")
    rank.go()
    assert rank.report()["complete"]
    for engine in node.engines:
        node.serves(engine, "C")


def test_an_engine_whose_requests_take_too_long_to_wait_for_is_left_serving(node, flights):
    """The other one, which is idle, gets the weights; the next push reaches both."""
    busy, idle = node.engines
    running = [flights.start(busy, 4000) for _ in range(6)]
    rank = push_to(node, None, pause="wait")
    report = rank.report()
    outcome = {e["engine"]: e["outcome"] for e in report["engines"]}
    assert outcome == {busy.name: "lost", idle.name: "committed"}  # it did not answer in time; it is well
    node.serves(idle, "C")
    until(lambda: not node.info(busy)["paused"], "it serves")
    node.serves(busy, node.before)  # while the requests go on
    assert not any(flight.done() for flight in running)
    node.post(busy, "/pause", {"mode": "abort"}).raise_for_status()
    for flight in running:
        assert all_of(node, node.before, landed(flight, "abort"))


def test_abort_ends_requests_and_says_so(node, flights):
    running = flights.start_all()
    rank = push_to(node, 0, pause="abort")
    for engine, flight in zip(node.engines, running, strict=True):
        assert node.info(engine)["running"] == 0
        tokens = landed(flight, "abort")
        assert len(tokens) < LONG[engine.tp]
        assert all_of(node, node.before, tokens)
        assert node.post(engine, "/generate", {"prompt_ids": PROMPT, "max_tokens": 1}).status_code == 503
    rank.go()
    assert rank.report()["complete"]
    for engine in node.engines:
        node.serves(engine, "C")


def test_none_never_holds_a_request(node, flights):
    running = flights.start_all()
    rank = push_to(node, 9, pause="none")
    for engine in node.engines:  # half of the new weights are in, and it serves
        info = node.info(engine)
        assert (info["torn"], info["paused"]) == (True, False)
        answer = node.post(engine, "/generate", {"prompt_ids": PROMPT, "max_tokens": TAIL}).raise_for_status().json()
        assert len(answer["token_ids"]) == TAIL
    late = flights.start_all()
    rank.go()
    report = rank.report()
    assert report["complete"]
    for engine in node.engines:
        node.serves(engine, "C")
    whole(node, running)
    for flight, tokens in zip(late, whole(node, late), strict=True):
        assert flight.result().json()["weight_version"] == report["version"]
        assert all(likely(node, "C", tokens)[-TAIL:]), "its tail is of the new weights alone"


@pytest.mark.parametrize("victim", [0, 1])
def test_none_and_an_engine_that_fails_half_way(node, flights, victim):
    broken, well = node.engines[victim], node.engines[1 - victim]
    node.order(broken, fail={"endpoint": "/load", "after": 6})
    rank = push_to(node, 9, pause="none")
    names = [engine.name for engine in node.engines]
    running = dict(zip(names, flights.start_all(), strict=True))  # on a mixture: that is what was asked
    rank.go()
    report = rank.report()
    outcome = {e["engine"]: e["outcome"] for e in report["engines"]}
    assert outcome == {broken.name: "torn", well.name: "committed"}
    node.does_not_serve(broken)
    assert len(landed(running[broken.name], "abort")) < LONG[broken.tp]
    assert len(landed(running[well.name])) == LONG[well.tp]
    node.serves(well, "C")
    assert node.info(broken)["running"] == 0


def test_requests_held_by_a_push_that_touched_nothing_go_on_as_before(node, flights):
    running = flights.start_all()
    rank = push_to(node, 0, broken=True)
    rank.go()
    assert rank.error()["kind"] == "PushAborted"
    for tokens in whole(node, running):
        assert all_of(node, node.before, tokens)


def test_requests_held_by_a_push_that_failed_half_way_wait_for_the_next(node, flights):
    old = node.before
    running = flights.start_all()
    rank = push_to(node, 9)
    rank.kill()
    node.wait_idle()
    assert node.torn_or_whole(old) == {"e1", "e2"}
    assert not any(flight.done() for flight in running)
    new = node.check()
    assert new != old
    for tokens in whole(node, running):
        assert changed_over(node, old, new, tokens)


def test_many_requests_and_many_pushes(node, flights):
    """Clients that never stop asking, in the default mode: no request fails, and each answer is of one version, or of
    the two that met in it.
    """
    stop = threading.Event()

    def ask(engine):
        heard = []
        while not stop.is_set():
            body = {"prompt_ids": PROMPT, "max_tokens": 40}
            heard.append(node.post(engine, "/generate", body, LASTS).raise_for_status().json())
        return heard

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, engine) for engine in [*node.engines, *node.engines]]
        try:
            reports = [node.push(name) for name in ["C", "A", "B"] * 4]
        finally:
            stop.set()
        answers = [answer for one in asking for answer in one.result(LASTS + 20)]
    assert all(report.complete for report in reports)
    assert {len(answer["token_ids"]) for answer in answers} == {40}
    known = {report.version: name for report, name in zip(reports, ["C", "A", "B"] * 4, strict=True)}
    for answer in answers:
        tail = known.get(answer["weight_version"], node.before)
        assert likely(node, tail, answer["token_ids"])[-1], "its last token is of the version that it names"


class TestAnEngineThatAnOperatorHadPaused:
    """It is the operator's to resume, until a push has given it new weights."""

    @pytest.fixture
    def paused(self, node):
        engine = node.engines[0]
        node.post(engine, "/pause", {"mode": "keep"}).raise_for_status()
        return engine

    def stays_paused(self, node, paused):
        info = node.info(paused)
        assert (info["paused"], info["torn"]) == (True, False)
        other = node.engines[1]
        until(lambda: not node.info(other)["paused"], "the other one serves")
        node.wait_engine_state(other.name, "serving")
        assert node.engine_state(paused.name) == "paused"
        assert node.info(paused)["paused"]
        node.post(paused, "/resume", {}).raise_for_status()
        node.serves(paused, node.before)

    def test_stays_paused_after_a_push_that_is_refused(self, node, paused):
        rank = push_to(node, None, change={"model.normal.weight": "add"})
        error = rank.error()
        assert (error["kind"], error["phase"]) == ("PushRefused", "accept")
        node.serves(node.engines[1], node.before)
        self.stays_paused(node, paused)

    @pytest.mark.parametrize("pause", ["keep", "none", "wait"])
    def test_stays_paused_after_a_push_that_was_aborted_untouched(self, node, paused, pause):
        rank = push_to(node, 0, broken=True, pause=pause)
        rank.go()
        assert rank.error()["kind"] == "PushAborted"
        node.wait_idle()
        self.stays_paused(node, paused)

    def test_stays_paused_when_it_is_left_out_of_a_push(self, node, paused):
        node.order(paused, fail={"endpoint": "/pause"})
        report = push_to(node, None).report()
        outcome = {e["engine"]: e["outcome"] for e in report["engines"]}
        assert outcome == {"e1": "skipped", "e2": "committed"}
        self.stays_paused(node, paused)

    @pytest.mark.parametrize("pause", ["keep", "none", "wait", "abort"])
    def test_serves_after_a_push_that_commits(self, node, paused, pause):
        assert push_to(node, None, pause=pause).report()["complete"]
        node.serves(paused, "C")
