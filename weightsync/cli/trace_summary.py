"""Summary of a push's trace, which shows where its time went: a table of steps and one of engines.

`summarise` makes plain data of a document of `weightsync.chrome_trace`, from a daemon or from a file in
`log.trace_dir`. `summary_view` shows it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta
from rich.console import Group
from rich.text import Text

from weightsync.cli.views import decimal_size, empty_table
from weightsync.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["read_trace", "summarise", "summary_view"]

_AT_ENGINES = ("pause", "begin", "load", "release", "finish", "verify", "resume")
_SHOWN = 8  # failures and unfinished pieces that are listed at most


Natural = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0.0)]


class _Push(msgspec.Struct):
    """The part of `otherData` that is shown. Other programs' traces do not have it."""

    model: str
    version: int
    state: str
    seconds: Seconds
    bytes: Natural
    buckets: Natural
    began: str
    node: str
    waiting_for: str = ""
    error: str = ""
    dropped: Natural = 0


class _Details(msgspec.Struct):
    engine: str | None = None
    bucket: int | None = None
    bytes: Natural = 0
    failed: str = ""


class _Work(msgspec.Struct, tag_field="ph", tag="X"):
    name: str
    cat: str
    pid: int
    tid: int
    ts: float
    dur: Seconds
    args: _Details


class _Label(msgspec.Struct):
    name: str = ""


class _Name(msgspec.Struct, tag_field="ph", tag="M"):
    name: str
    pid: int
    tid: int
    args: _Label


class _Document(msgspec.Struct):
    otherData: _Push  # noqa: N815 - as the format spells it
    traceEvents: list[_Work | _Name]  # noqa: N815


def read_trace(text: bytes, name: str) -> dict[str, Any]:
    """Return the document in a file. Raises `ConfigError` if it is no trace of ours, such as another program's."""
    try:
        found: dict[str, Any] = msgspec.json.decode(text)
        msgspec.convert(found, _Document)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{name} is no trace of a push: {error}", hint="weightsync trace -o FILE writes one"
        ) from error
    return found


def summarise(document: dict[str, Any]) -> dict[str, Any]:
    """Return seconds and bytes by step and by engine, and what failed or never ended.

    A step's seconds are those in which any piece of it was under way. Steps overlap.
    """
    rows = _rows(document)
    lanes = {
        (r["pid"], r["tid"]): r["args"].get("name", "?") for r in document["traceEvents"] if r["name"] == "thread_name"
    }
    by_step: dict[str, list[dict[str, Any]]] = defaultdict(list)
    by_engine: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_step[row["cat"]].append(row)
        if (engine := row["args"].get("engine")) is not None:
            by_engine[engine].append(row)
    steps = [{"step": step, **_step(pieces, lanes)} for step, pieces in by_step.items()]
    engines = [{"engine": name, **_engine(pieces)} for name, pieces in sorted(by_engine.items())]
    return {
        "push": document.get("otherData", {}),
        "steps": sorted(steps, key=lambda step: float(step["from"])),
        "engines": engines,
        "failed": [_piece(row, lanes) | {"why": row["args"]["failed"]} for row in rows if "failed" in row["args"]],
        "unfinished": [_piece(row, lanes) for row in rows if "unfinished" in row["args"]],
    }


def _rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in document["traceEvents"] if row["ph"] == "X"]


def _step(pieces: Sequence[dict[str, Any]], lanes: dict[tuple[int, int], str]) -> dict[str, Any]:
    seconds = _under_way(pieces)
    nbytes = sum(row["args"].get("bytes", 0) for row in pieces)
    slowest = _slowest(pieces)
    return {
        "from": min(row["ts"] for row in pieces) / 1e6,
        "seconds": seconds,
        "pieces": len(pieces),
        "bytes": nbytes,
        "GB/s": nbytes / seconds / 1e9 if seconds else 0.0,
        "slowest": _piece(slowest, lanes) if slowest is not None else None,
    }


def _engine(pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    steps = {step: _under_way([row for row in pieces if row["cat"] == step]) for step in _AT_ENGINES}
    loads = [row for row in pieces if row["cat"] == "load"]
    slowest = _slowest(loads)
    worst = {"bucket": slowest["args"].get("bucket"), "seconds": slowest["dur"] / 1e6} if slowest is not None else None
    return {"seconds": steps, "bytes": sum(row["args"].get("bytes", 0) for row in loads), "slowest": worst}


def _slowest(pieces: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the slowest piece whose end is known. Pieces under way when the trace was full have no known end."""
    return max((row for row in pieces if "cut" not in row["args"]), key=lambda row: float(row["dur"]), default=None)


def _piece(row: dict[str, Any], lanes: dict[tuple[int, int], str]) -> dict[str, Any]:
    lane = row["args"].get("engine") or lanes.get((row["pid"], row["tid"]), "?").partition(" (")[0].partition(":")[0]
    return {"name": row["name"], "of": lane, "seconds": row["dur"] / 1e6}


def _under_way(pieces: Iterable[dict[str, Any]]) -> float:
    """Return the seconds in which at least one of the pieces was under way."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted((row["ts"], row["ts"] + row["dur"]) for row in pieces):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total / 1e6


def summary_view(summary: dict[str, Any]) -> Group:
    """Return the summary as tables and sentences, for a terminal of 100 columns."""
    push = summary["push"]
    steps = empty_table("step", "from", "seconds", "pieces", "bytes", "GB/s", "slowest piece", right=(1, 2, 3, 4, 5))
    for step in summary["steps"]:
        slowest = step["slowest"]
        nbytes, speed = (decimal_size(step["bytes"]), f"{step['GB/s']:.2f}") if step["bytes"] else ("", "")
        worst = ""
        if slowest is not None:
            name = slowest["name"] if slowest["name"] != step["step"] else ""
            worst = f"{slowest['seconds']:.4f} s  {slowest['of']} {name}".rstrip()
        steps.add_row(
            step["step"], f"{step['from']:.4f}", f"{step['seconds']:.4f}", str(step["pieces"]), nbytes, speed, worst
        )
    engines = empty_table("engine", *_AT_ENGINES, "slowest bucket", right=range(1, 8))
    for engine in summary["engines"]:
        slowest = engine["slowest"]
        worst = f"{slowest['bucket']}: {slowest['seconds']:.4f} s" if slowest else "–"
        seconds = (engine["seconds"][step] for step in _AT_ENGINES)
        engines.add_row(engine["engine"], *(f"{each:.4f}" if each else "–" for each in seconds), worst)
    return Group(*_head(push), Text(), steps, Text(), engines, *_wrong(summary))


def _head(push: dict[str, Any]) -> list[Text]:
    if not push:
        return []
    seconds, nbytes = push["seconds"], push["bytes"]
    speed = f", {nbytes / seconds / 1e9:.2f} GB/s" if seconds and nbytes else ""
    what = f"version {push['version']} of {push['model']}, {push['state']}"
    how = f"{decimal_size(nbytes)} in {push['buckets']} buckets, {seconds:.3f} s{speed}"
    lines = [Text(f"{what}: {how}"), Text(f"began {push['began']} on node {push['node']}")]
    if push.get("waiting_for"):
        lines.append(Text(f"under way, waiting for {push['waiting_for']}", style="yellow"))
    if push.get("error"):
        lines.append(Text(push["error"], style="red"))
    if push.get("dropped"):
        what = f"{push['dropped']} notes of single buckets came after it was full"
        lines.append(Text(f"the trace is not whole: {what}; what went wrong is in it", style="yellow"))
    return lines


def _wrong(summary: dict[str, Any]) -> list[Text]:
    lines = [Text(f"failed: {p['of']} {p['name']} after {p['seconds']:.3f} s: {p['why']}") for p in summary["failed"]]
    lines += [Text(f"not ended: {p['of']} {p['name']}, {p['seconds']:.3f} s so far") for p in summary["unfinished"]]
    more = [Text(f"… and {len(lines) - _SHOWN} more")] if len(lines) > _SHOWN else []
    return [Text(), *lines[:_SHOWN], *more] if lines else []
