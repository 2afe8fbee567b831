"""Traces of pushes that began on this node, for `weightsync trace`: each model's last push, and its last that failed.

If `log.trace_dir` is set, the newest traces are written there as files, too.
"""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsync.chrome_trace import document
from weightsync.errors import ConfigError
from weightsync.wire import messages as msg

if TYPE_CHECKING:
    from weightsync.session.trace import Trace

__all__ = ["PushTrace", "Traces", "write_trace"]

logger = logging.getLogger(__name__)

_KEPT = 20  # files
_WAITING = 4  # traces that may wait for a slow disk; each may take 15 MB


@dataclass(frozen=True)
class PushTrace:
    """The trace of a push, and what is known of the push itself."""

    trace: Trace
    until: float  # when the trace was taken
    model: str
    version: int
    about: dict[str, Any]

    def document(self) -> dict[str, Any]:
        """As `weightsync.chrome_trace` writes it. Takes a second for 100,000 spans: call it in a thread."""
        return document(self.trace, self.until, self.about)


class Traces:
    """See the module."""

    def __init__(self, node: str, directory: str) -> None:
        """`directory` is `log.trace_dir`, or empty."""
        self._node = node
        self._directory = directory
        self._last: dict[str, PushTrace] = {}  # by model
        self._failed: dict[str, PushTrace] = {}
        self._newest = ""  # model of the push that ended last
        self._unwritten: queue.Queue[tuple[str, PushTrace]] = queue.Queue(_WAITING)
        self._writer: threading.Thread | None = None

    def keep(self, trace: PushTrace, *, failed: bool) -> None:
        """Keep the trace of a push that has ended."""
        self._newest = trace.model
        self._last[trace.model] = trace
        if failed:
            self._failed[trace.model] = trace

    def write(self, trace: PushTrace, push: str) -> None:
        """Have a thread write the file, if there is a directory. No push waits for it: a disk may hang."""
        if not self._directory:
            return
        if self._writer is None:  # a daemon thread: the process ends without it
            self._writer = threading.Thread(target=self._write_all, name="traces", daemon=True)
            self._writer.start()
        try:
            self._unwritten.put_nowait((f"push-{push}-v{trace.version}", trace))
        except queue.Full:
            logger.warning("log.trace_dir: %s is slow; the trace of push %s is left out", self._directory, push)

    async def settle(self, until: float) -> bool:
        """Wait for the files, but no longer than `until`. Returns whether all are written."""
        while self._unwritten.unfinished_tasks and time.monotonic() < until:  # noqa: ASYNC110 - the thread knows no loop
            await asyncio.sleep(0.01)
        if left := self._unwritten.unfinished_tasks:
            logger.warning("log.trace_dir: %s is slow; %d traces are left out", self._directory, left)
        return not left

    def _write_all(self) -> None:
        while True:
            name, trace = self._unwritten.get()
            try:
                write_trace(self._directory, name, trace.document())
            except Exception:
                logger.exception("log.trace_dir: the trace %s cannot be written", name)
            finally:
                self._unwritten.task_done()

    async def answer(self, question: msg.TraceRequest, current: PushTrace | None) -> msg.Traced:
        """Return the trace that is asked for. `current` is the push under way. Raises `ConfigError` if none is kept."""
        found = self._find(question, current)
        if found is None:
            what = f"of model {question.model!r} " if question.model else ""
            what = f"no push {what}has {'failed' if question.failed else 'begun'} on node {self._node}"
            known = ", ".join(sorted(self._failed if question.failed else self._last))
            hint = f"there are traces of {known}" if known else "a push is traced on the node of its rank 0"
            raise ConfigError(f"{what} since its weightsyncd was started", hint=hint)
        text = await asyncio.to_thread(lambda: json.dumps(found.document(), separators=(",", ":")).encode())
        return msg.Traced(model=found.model, version=found.version, document=text)

    def _find(self, question: msg.TraceRequest, current: PushTrace | None) -> PushTrace | None:
        if question.failed:
            newest = max(self._failed.values(), key=lambda trace: trace.until, default=None)
            return self._failed.get(question.model) if question.model else newest
        if current is not None and question.model in ("", current.model):
            return current
        return self._last.get(question.model or self._newest)


def write_trace(directory: str, name: str, document: dict[str, Any]) -> None:
    """Write one trace, and remove all but the newest. If the directory cannot be written to, only warn: the push has
    ended, and that does not change its outcome.
    """
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f".{name}.json"
        draft.write_text(json.dumps(document))
        draft.rename(folder / f"{name}.json")
        written = sorted(folder.glob("push-*.json"), key=lambda path: path.stat().st_mtime)
        for path in written[:-_KEPT]:
            path.unlink()
    except OSError as error:
        logger.warning("log.trace_dir: %s", error)
