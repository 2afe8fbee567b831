"""Repair vLLM's executor, which a call that fails in one of several workers leaves out of step. Part of our plugin.

vLLM asks all workers and reads their answers in rank order, up to the first error. The answers of later ranks stay in
their queues, and from then on each is taken for an answer to the next call: an update then counts as done when rank 0
says so, together with an older answer of rank 1. Seen from 0.26 to 0.32 with tensor parallelism of 2, and reported
upstream as vllm-project/vllm#57846. The repair counts the answers behind an error, and discards them when they come.

Executors live in vLLM's engine core, which loads plugins before it makes one.
"""

from __future__ import annotations

import logging
from collections import Counter
from functools import wraps
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["InStep", "mend_executor"]

logger = logging.getLogger(__name__)

_MARK = "_weightsync_mended"


class InStep:
    """A rank's queue of answers, for one call.

    `owed` counts, by rank, the answers that an error has left unread. They are read and discarded before the rank's
    next answer.
    """

    def __init__(self, rank: int, queue: Any, owed: Counter[int], behind: Sequence[int], success: Any) -> None:
        """`behind` are the ranks whose answers vLLM does not read if this rank's answer is an error."""
        self._rank = rank
        self._queue = queue
        self._owed = owed
        self._behind = behind
        self._success = success

    def dequeue(self, *args: Any, **kwargs: Any) -> Any:
        """Read the next answer as the queue itself does, after discarding the answers that are owed."""
        while self._owed[self._rank]:
            self._queue.dequeue(*args, **kwargs)
            self._owed[self._rank] -= 1
        try:
            status, result = self._queue.dequeue(*args, **kwargs)
        except TimeoutError:
            self._owed.update((self._rank, *self._behind))
            raise
        if status != self._success:
            self._owed.update(self._behind)
        return status, result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)


def mend_executor() -> None:
    """Repair the executor for several workers, once. An unknown executor is left as it is, with a warning."""
    try:
        module = import_module("vllm.v1.executor.multiproc_executor")
        executor, success = module.MultiprocExecutor, module.WorkerProc.ResponseStatus.SUCCESS
        parameters = signature(executor.collective_rpc).parameters
    except (ImportError, AttributeError) as error:
        logger.warning("a call that fails with several workers may leave this vllm out of step: %s", error)
        return
    original = executor.collective_rpc
    if hasattr(original, _MARK):
        return
    if "unique_reply_rank" not in parameters:
        logger.warning("a call that fails with several workers may leave this vllm out of step: it is another executor")
        return

    @wraps(original)
    def collective_rpc(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = signature(original).bind(self, *args, **kwargs).arguments
        merged = any(value is not None for name, value in asked.items() if name.endswith("_output_aggregator"))
        one = asked.get("unique_reply_rank") is not None and not merged  # only that rank answers
        queues = self.response_mqs
        owed = self.__dict__.setdefault("_weightsync_owed", Counter())
        ranks = range(len(queues))
        self.response_mqs = [InStep(r, queues[r], owed, () if one else ranks[r + 1 :], success) for r in ranks]
        try:
            return original(self, *args, **kwargs)
        finally:
            self.response_mqs = queues

    setattr(collective_rpc, _MARK, True)
    executor.collective_rpc = collective_rpc
