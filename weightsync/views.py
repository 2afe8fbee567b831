"""Tables for the terminal, made from the plain data of `weightsync status --json`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Container

__all__ = ["empty_table", "engine_details", "findings_view", "replay_details", "status_view"]

_COLOURS = {"serving": "green", "committed": "green", "connected": "green", "torn": "red", "lost": "red"}


def empty_table(*columns: str, right: Container[int] = ()) -> Table:
    """An empty one; numbers of the columns in `right` are flush with its right edge."""
    empty = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        empty.add_column(column, justify="right" if number in right else "left")
    return empty


def _coloured(word: str) -> Text:
    return Text(word, style=_COLOURS.get(word, "yellow"))


def _or_dash(value: Any) -> str:
    return "–" if value is None else str(value)


def status_view(status: dict[str, Any], clock: str) -> Group:
    """A whole daemon at a glance."""
    head = Text(
        f"{status['software']} on node {status['node']}, pid {status['pid']}, up {status['uptime']:.0f} s, at {clock}"
    )
    engines = empty_table("engine", "node", "model", "state", "serves", "tp", "url", "problem")
    for e in status["engines"]:
        state = _coloured(e["state"])
        version, tp = _or_dash(e["version"]), _or_dash(e["tp_size"])
        model = f"{e['model']} (frozen)" if e["frozen"] else e["model"]
        engines.add_row(e["name"], e["node"], model, state, version, tp, e["url"], e["error"] or "")
    bridges = empty_table("bridge", "pid", "slots", "on GPU", "open exports", "restarts", "problem")
    for b in status["bridges"]:
        slots = f"{b['slots']} × {b['slot_bytes'] / 2**20:g} MiB"
        name, restarts = f"{b['node']}/{b['index']}", str(b["restarts"])
        gpu = b["gpu"].partition("-")[0] or None
        bridges.add_row(
            name, _or_dash(b["pid"]), slots, _or_dash(gpu), str(b["outstanding"]), restarts, b["error"] or ""
        )
    parts: list[Any] = [head, Text(), engines, Text(), bridges]
    if status["peers"]:
        peers = empty_table("peer", "state")
        for name, state in status["peers"].items():
            peers.add_row(name, _coloured(state))
        parts += [Text(), peers]
    kept = [f"version {version} of {model}" for model, version in status["kept"].items()]
    if kept:
        parts += [Text(), Text(f"kept for engines that come late: {', '.join(kept)}")]
    return Group(*parts, Text(), _push_line(status), *_last_push(status))


def _push_line(status: dict[str, Any]) -> Text:
    push = status["push"]
    if push is None:
        return Text("no push is under way")
    share = 100 * push["filled_bytes"] / push["nbytes"] if push["nbytes"] else 0
    text = f"pushing version {push['version']} of {push['model']}: {push['state']} for {push['seconds']:.1f} s, "
    return Text(f"{text}{share:.0f} % filled" + (f", waiting for {push['waiting_for']}" if push["waiting_for"] else ""))


def _last_push(status: dict[str, Any]) -> list[Any]:
    last, error = status["last"], status["last_error"]
    if last is None:
        return []
    if error is not None:
        return [
            Text(f"last push: version {last['version']} of {last['model']} failed: {error['message']}", style="red")
        ]
    phases = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in last["phases"].items())
    outcomes = ", ".join(f"{e['engine']} {e['outcome']}" for e in last["engines"])
    size = f"{last['nbytes'] / 1e6:.1f} MB in {last['seconds']:.3f} s"
    return [Text(f"last push: version {last['version']} of {last['model']}, {size} ({phases}); {outcomes}")]


def findings_view(findings: list[dict[str, Any]]) -> Table:
    """What the doctor found, and what mends it."""
    table = empty_table("", "found", "what mends it")
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    for finding in findings:
        table.add_row(Text(finding["level"], style=colours[finding["level"]]), finding["what"], finding["fix"])
    return table


def engine_details(engines: list[dict[str, Any]]) -> Table:
    """What each engine is and how it is spoken to."""
    table = empty_table("engine", "node", "kind", "software", "profile", "tp", "state", "serves")
    for e in engines:
        software, profile = _or_dash(e["software"]), _or_dash(e["profile"])
        tp, version = _or_dash(e["tp_size"]), _or_dash(e["version"])
        table.add_row(e["name"], e["node"], e["kind"], software, profile, tp, _coloured(e["state"]), version)
    return table


_REPLAY = {
    "record": "recorded; its proof is the next push",
    "prove": "proved; replays from the next push on",
    "replay": "replays",
    "loader": "nothing can be replayed",
    "off": "off",
}


def replay_details(engines: list[dict[str, Any]]) -> Group:
    """Of which tensors each engine's loader is replayed, and what the others are still given to it for."""
    table = empty_table(
        "engine", "replay", "tensors", "bytes", "moves", "by the loader", "seconds with it", "without", "note"
    )
    why = empty_table("engine", "by the loader", "tensors")
    for e in engines:
        facts = e["replay"]
        if facts is None:
            table.add_row(e["name"], "nothing was told: no push yet, or no plugin", *[""] * 7)
            continue
        with_it = facts["seconds"].get("prove", facts["seconds"].get("loader"))
        table.add_row(
            e["name"],
            _REPLAY.get(facts["phase"], facts["phase"]),
            str(facts["replayed"]),
            f"{facts['replayed_bytes'] / 1e6:,.1f} MB",
            str(facts["moves"]),
            f"{facts['by_loader']} ({facts['by_loader_bytes'] / 1e6:,.1f} MB)",
            _or_dash(with_it and f"{with_it:.4f}"),
            _or_dash((seconds := facts["seconds"].get("replay")) and f"{seconds:.4f}"),
            facts["note"],
        )
        for reason, names in facts["why"].items():
            why.add_row(e["name"], reason, ", ".join(names))
    return Group(table, Text(), why) if why.row_count else Group(table)
