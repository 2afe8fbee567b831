"""Tables of engines and of findings for the terminal, made from the plain data that `--json` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Container

__all__ = ["coloured", "decimal_size", "empty_table", "engine_details", "findings_view", "or_dash", "replay_details"]

_COLOURS = {"serving": "green", "committed": "green", "connected": "green", "torn": "red", "lost": "red"}


def empty_table(*columns: str, right: Container[int] = ()) -> Table:
    """Return an empty table. The columns numbered in `right` are right-aligned."""
    empty = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        empty.add_column(column, justify="right" if number in right else "left")
    return empty


def coloured(word: str) -> Text:
    """Return a state in its colour: green if all is well, red if it is broken, otherwise yellow."""
    return Text(word, style=_COLOURS.get(word, "yellow"))


def or_dash(value: Any) -> str:
    """Return the value as text, "–" for None."""
    return "–" if value is None else str(value)


def decimal_size(nbytes: int) -> str:
    """Return a size in GB or MB, the units of GB/s. For memory, in GiB, see `weightsync.doctor.sizes`."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def findings_view(findings: list[dict[str, Any]]) -> Table:
    """Return a table of the doctor's findings and their fixes."""
    table = empty_table("", "found", "what mends it")
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    for finding in findings:
        table.add_row(Text(finding["level"], style=colours[finding["level"]]), finding["what"], finding["fix"])
    return table


def engine_details(engines: list[dict[str, Any]]) -> Table:
    """Return a table of what each engine is, and of the profile that it is driven by."""
    table = empty_table("engine", "node", "kind", "software", "profile", "tp", "state", "serves")
    for e in engines:
        software, profile = or_dash(e["software"]), or_dash(e["profile"])
        tp, version = or_dash(e["tp_size"]), or_dash(e["version"])
        table.add_row(e["name"], e["node"], e["kind"], software, profile, tp, coloured(e["state"]), version)
    return table


_REPLAY = {
    "record": "recorded; its proof is the next push",
    "prove": "proved; replays from the next push on",
    "replay": "replays",
    "loader": "nothing can be replayed",
    "off": "off",
}


def replay_details(engines: list[dict[str, Any]]) -> Group:
    """Return a table of how many tensors each engine replays, and one of why the others still go to its loader."""
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
            or_dash(with_it and f"{with_it:.4f}"),
            or_dash((seconds := facts["seconds"].get("replay")) and f"{seconds:.4f}"),
            facts["note"],
        )
        for reason, names in facts["why"].items():
            why.add_row(e["name"], reason, ", ".join(names))
    return Group(table, Text(), why) if why.row_count else Group(table)
