"""A call that fails in one of several workers leaves vLLM out of step; mended wherever our plugin is loaded.

vLLM asks all workers and reads their answers in order, up to the first that is an error. What the ranks behind it have
answered stays in their queues, and from then on each of their answers is taken for one to the call after: an update is
done when rank 0 says so, and what rank 1 said before. Seen from 0.26 to 0.32 with tensor parallelism of 2; told
upstream as vllm-project/vllm#57846. Here the answers behind an error are read, too, and thrown away.

Executors live in vLLM's engine core, which loads plugins before it makes one.
"""

from __future__ import annotations

import logging
from functools import wraps
from importlib import import_module
from inspect import signature
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["InStep", "mend_executor"]

logger = logging.getLogger(__name__)

_MARK = "_weightsync_mended"
_WAIT = 30.0  # seconds for the ranks behind one that failed; one that waits for it in a collective never answers


class InStep:
    """A rank's queue of answers. When it gives an error, those of the ranks behind it are emptied of theirs."""

    def __init__(self, queue: Any, behind: Sequence[Any], success: Any) -> None:
        self._queue = queue
        self._behind = behind
        self._success = success

    def dequeue(self, *args: Any, **kwargs: Any) -> Any:
        """As the queue's own."""
        status, result = self._queue.dequeue(*args, **kwargs)
        if status != self._success:
            until = monotonic() + _WAIT
            for queue in self._behind:
                try:
                    queue.dequeue(timeout=max(0.0, until - monotonic()))
                except TimeoutError:
                    logger.error("a rank behind one that failed does not answer: restart this server")  # noqa: TRY400
        return status, result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)


def mend_executor() -> None:
    """Mend the executor for several workers, once. One that looks otherwise is left as it is, with a warning."""
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
        queues = self.response_mqs
        if asked.get("unique_reply_rank") is not None:  # the others do not answer
            return original(self, *args, **kwargs)
        self.response_mqs = [InStep(queue, queues[rank + 1 :], success) for rank, queue in enumerate(queues)]
        try:
            return original(self, *args, **kwargs)
        finally:
            self.response_mqs = queues

    setattr(collective_rpc, _MARK, True)
    executor.collective_rpc = collective_rpc
