"""The trace of a push as a file for ui.perfetto.dev or chrome://tracing (Trace Event Format, JSON).

Times are microseconds on one axis, the coordinating node's clock. `otherData` says which push it is.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from weightsync.session.trace import TRAINER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightsync.session.trace import Span, Trace

__all__ = ["document"]


def document(trace: Trace, now: float, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the trace as one JSON object. Spans still under way end `now`; `about` becomes `otherData`."""
    spans = sorted(trace.spans(), key=lambda span: span.begin)
    origin = min([trace.start, *(span.begin for span in spans[:1])])  # ranks describe weights before the push starts
    rows: list[dict[str, Any]] = []
    processes: dict[str, int] = {}
    lanes: dict[tuple[str, str], list[float]] = {}  # (process, lane) → when each of its rows is free
    numbers: dict[tuple[str, str, int], int] = {}
    for span in spans:
        process = processes.setdefault(span.process, len(processes) + 1)
        free = lanes.setdefault((span.process, span.lane), [])
        end = now if span.end is None else span.end
        row = next((i for i, until in enumerate(free) if until <= span.begin), len(free))
        free[row : row + 1] = [end]
        thread = numbers.setdefault((span.process, span.lane, row), len(numbers) + 1)
        rows.append(
            {
                "ph": "X",
                "name": span.name,
                "cat": span.step,
                "pid": process,
                "tid": thread,
                "ts": round((span.begin - origin) * 1e6, 1),
                "dur": round((end - span.begin) * 1e6, 1),
                "args": _details(span, end - span.begin),
            }
        )
    named: list[tuple[str, int, int, dict[str, Any]]]
    named = [("process_name", pid, 0, {"name": name}) for name, pid in processes.items()]
    order = sorted(processes, key=lambda name: (name != TRAINER, name != trace.home, _natural(name)))
    named += [("process_sort_index", processes[name], 0, {"sort_index": i}) for i, name in enumerate(order)]
    for i, (node, lane, row) in enumerate(sorted(numbers, key=lambda key: (_natural(key[1]), key[2]))):
        pid, tid = processes[node], numbers[node, lane, row]
        named.append(("thread_name", pid, tid, {"name": lane if row == 0 else f"{lane} ({row + 1})"}))
        named.append(("thread_sort_index", pid, tid, {"sort_index": i}))
    names = [{"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": args} for kind, pid, tid, args in named]
    more = {"dropped": trace.dropped} if trace.dropped else {}
    return {"displayTimeUnit": "ms", "otherData": {**about, **more}, "traceEvents": [*names, *rows]}


def _details(span: Span, seconds: float) -> dict[str, Any]:
    details: dict[str, Any] = {}
    if span.bucket is not None:
        details["bucket"] = span.bucket
    if span.engine:
        details["engine"] = span.engine
    if span.rank is not None:
        details["rank"] = span.rank
    if span.nbytes:
        details["bytes"] = span.nbytes
        if span.end is not None and not span.cut and seconds > 0:
            details["GB/s"] = round(span.nbytes / seconds / 1e9, 3)
    if span.failed:
        details["failed"] = span.failed
    elif span.end is None:
        details["unfinished"] = True
    elif span.cut:
        details["cut"] = True
    return details


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Return a sort key that puts "rank 2" before "rank 10"."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]
