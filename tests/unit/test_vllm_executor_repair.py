"""The mending of vLLM's executor for several workers, on one that reads its answers as vLLM's does."""

from __future__ import annotations

import sys
from collections import deque
from enum import Enum
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from weightsync.adapters.vllm.executor_repair import mend_executor

if TYPE_CHECKING:
    from collections.abc import Sequence


class Status(Enum):
    SUCCESS = 1
    FAILURE = 2


class Queue:
    """Answers of one rank."""

    def __init__(self, *answers):
        self.answers = deque(answers)

    def dequeue(self, timeout=None):
        if not self.answers:
            raise TimeoutError
        return self.answers.popleft()


class Executor:
    """As vllm/v1/executor/multiproc_executor.py of 0.32 in what matters here."""

    def __init__(self, *queues):
        self.response_mqs = list(queues)

    def collective_rpc(
        self,
        method,
        timeout=None,
        args=(),
        kwargs=None,
        non_block=False,
        unique_reply_rank=None,
        kv_output_aggregator=None,
    ):
        queues: Sequence[Any] = self.response_mqs
        if unique_reply_rank is not None and kv_output_aggregator is None:
            queues = (queues[unique_reply_rank],)

        def get_response():
            found = []
            for queue in queues:
                status, result = queue.dequeue(timeout=timeout)
                if status != Status.SUCCESS:
                    raise RuntimeError(f"Worker failed with error {result!r}")
                found.append(result)
            return found

        return get_response if non_block else get_response()


def ok(text):
    return (Status.SUCCESS, text)


def failed(text):
    return (Status.FAILURE, text)


@pytest.fixture(params=["mended", "as it is"])
def executor(request, monkeypatch):
    module: Any = ModuleType("vllm.v1.executor.multiproc_executor")
    module.MultiprocExecutor = type("MultiprocExecutor", (Executor,), {"collective_rpc": Executor.collective_rpc})
    module.WorkerProc = type("WorkerProc", (), {"ResponseStatus": Status})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    if request.param == "mended":
        mend_executor()
        mend_executor()  # plugins are loaded more than once
    return module.MultiprocExecutor, request.param == "mended"


def test_a_call_after_one_that_failed_gets_its_own_answers(executor):
    kind, mended = executor
    one = kind(Queue(failed("a"), ok("0 of b")), Queue(failed("a"), ok("1 of b")), Queue(ok("2 of a"), ok("2 of b")))
    with pytest.raises(RuntimeError, match="failed with error 'a'"):
        one.collective_rpc("a")
    if mended:
        assert one.collective_rpc("b") == ["0 of b", "1 of b", "2 of b"]
    else:  # what this is about
        with pytest.raises(RuntimeError, match="failed with error 'a'"):
            one.collective_rpc("b")


def test_calls_that_are_waited_for_later_are_mended_too(executor):
    kind, mended = executor
    one = kind(Queue(failed("a"), ok("0 of b")), Queue(ok("1 of a"), ok("1 of b")))
    with pytest.raises(RuntimeError):
        one.collective_rpc("a", non_block=True)()
    assert one.collective_rpc("b") == ["0 of b", "1 of b" if mended else "1 of a"]


def test_a_call_that_one_rank_answers_takes_nothing_from_the_others(executor):
    kind, _ = executor
    one = kind(Queue(failed("a"), ok("0 of b")), Queue(ok("1 of b")))
    with pytest.raises(RuntimeError):
        one.collective_rpc("a", unique_reply_rank=0)
    assert one.collective_rpc("b") == ["0 of b", "1 of b"]


def test_answers_that_come_late_are_thrown_away_when_they_come(executor):
    """Nobody waits for them: a rank may wait in a collective for the one that failed."""
    kind, mended = executor
    late = Queue()
    one = kind(Queue(failed("a"), ok("0 of b"), ok("0 of c")), late)
    with pytest.raises(RuntimeError, match="failed with error 'a'"):
        one.collective_rpc("a")
    late.answers.extend([ok("1 of a"), ok("1 of b"), ok("1 of c")])
    assert one.collective_rpc("b") == ["0 of b", "1 of b" if mended else "1 of a"]
    assert one.collective_rpc("c") == ["0 of c", "1 of c" if mended else "1 of b"]


def test_a_call_that_times_out_leaves_the_next_its_own_answers(executor):
    kind, mended = executor
    late = Queue()
    one = kind(Queue(ok("0 of a"), ok("0 of b")), late, Queue(ok("2 of a"), ok("2 of b")))
    with pytest.raises(TimeoutError):
        one.collective_rpc("a", timeout=0.1)
    late.answers.extend([ok("1 of a"), ok("1 of b")])
    assert one.collective_rpc("b") == (["0 of b", "1 of b", "2 of b"] if mended else ["0 of b", "1 of a", "2 of a"])


@pytest.mark.parametrize("merged", [False, True])
def test_all_ranks_answer_a_call_whose_answers_are_merged(executor, merged):
    kind, mended = executor
    one = kind(Queue(failed("a"), ok("0 of b")), Queue(ok("1 of a"), ok("1 of b")))
    options = {"kv_output_aggregator": object()} if merged else {}
    if not merged:
        one.response_mqs[1].answers.popleft()  # it was not asked
    with pytest.raises(RuntimeError):
        one.collective_rpc("a", unique_reply_rank=0, **options)
    assert one.collective_rpc("b") == ["0 of b", "1 of b" if mended or not merged else "1 of a"]


def test_an_executor_that_looks_otherwise_is_left_alone(monkeypatch, caplog):
    module: Any = ModuleType("vllm.v1.executor.multiproc_executor")
    module.MultiprocExecutor = type("MultiprocExecutor", (), {"collective_rpc": lambda self, method: method})
    module.WorkerProc = type("WorkerProc", (), {"ResponseStatus": Status})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    before = module.MultiprocExecutor.collective_rpc
    mend_executor()
    assert module.MultiprocExecutor.collective_rpc is before
    assert "another executor" in caplog.text
