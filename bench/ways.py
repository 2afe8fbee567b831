"""The report of one way to bring weights into engines. All ways have the same one, so that they stand in one table."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bench.harness import Spread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["COLUMNS", "Way", "extent", "fastest", "in_turn", "load", "ratio", "rows"]

COLUMNS = (
    "way", "p50", "min", "max", "GB/s", "of memcpy", "time / first", "trainer blocked", "engine paused", "peak memory",
    "bytes checked",
)  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One way, run several times. Seconds and bytes."""

    name: str
    software: str  # what carried the bytes, with its version and settings
    seconds: Spread  # from the first rank's call until every engine has the weights
    blocked: Spread | None  # how long the trainer's weights may not change
    paused: Spread | None  # how long an engine does not serve; None: it is not paused
    checked: str  # which bytes were compared with the trainer's
    peak: dict[str, int]  # the most memory that a process of each kind had resident
    copied: int = 0  # bytes copied from host memory to host memory, all copies of a byte counted; 0: not known
    phases: dict[str, float] = field(default_factory=dict)  # medians
    load: tuple[float, ...] = ()  # for each run, the processes that wanted a core in the minute before it


def load() -> float:
    """Return how many processes wanted a core in the last minute."""
    return round(os.getloadavg()[0], 2)


def in_turn(ways: Sequence[Callable[[int], Way]], rounds: int) -> list[Way]:
    """Run all ways in turn, in so many `rounds`, so that other work of the machine slows all of them alike.

    Each way is called with the number of its round. Each round begins with another way.
    """
    found: list[list[Way]] = [[] for _ in ways]
    for turn in range(rounds):
        for i in range(len(ways)):
            at = (turn + i) % len(ways)
            found[at].append(ways[at](turn))
    return [_together(runs) for runs in found]


def _together(runs: Sequence[Way]) -> Way:
    def every(key: str) -> Spread | None:
        spreads = [getattr(run, key) for run in runs]
        return None if spreads[0] is None else Spread.of(second for spread in spreads for second in spread.all)

    seconds = every("seconds")
    assert seconds is not None
    return replace(
        runs[0],
        seconds=seconds,
        blocked=every("blocked"),
        paused=every("paused"),
        peak={kind: max(run.peak.get(kind, 0) for run in runs) for kind in runs[0].peak},
        phases={name: statistics.median(run.phases[name] for run in runs) for name in runs[0].phases},
        load=tuple(value for run in runs for value in run.load),
    )


def rows(ways: Sequence[Mapping[str, Any]], nbytes: int, ceiling: float) -> list[list[str]]:
    """Return the table's rows for ways from their JSON. Each moved `nbytes`; `ceiling` is in bytes a second.

    The first way is ours.
    """
    first = ways[0]["seconds"]["p50"]
    found = []
    for way in ways:
        seconds = way["seconds"]
        peak = ", ".join(f"{name} {held / 1e6:,.0f}" for name, held in way["peak"].items())
        of_copy = ratio(way["copied"] / seconds["p50"] / ceiling) if way["copied"] else "–"
        found.append(
            [
                way["name"],
                *(f"{value:.3f} s" for value in (seconds["p50"], *extent(seconds))),
                f"{nbytes / seconds['p50'] / 1e9:.2f}",
                of_copy,
                ratio(seconds["p50"] / first),
                *(f"{way[key]['p50']:.3f} s" if way[key] else "–" for key in ("blocked", "paused")),
                f"{peak} MB",
                way["checked"],
            ]
        )
    return found


def fastest(ways: Sequence[Mapping[str, Any]]) -> str:
    """Say which way has the least median, ours or not, and which ways' ranges overlap with its range."""
    best, *others = sorted(ways, key=lambda way: way["seconds"]["p50"])
    longest = extent(best["seconds"])[1]
    level = [way["name"] for way in others if extent(way["seconds"])[0] <= longest]
    return f"Fastest: {best['name']}{', level (ranges overlap) with ' + '; '.join(level) if level else ''}."


def extent(seconds: Mapping[str, Any]) -> tuple[float, float]:
    """Return the shortest and the longest run of a `Spread`, from its JSON."""
    return min(seconds["all"]), seconds["max"]


def ratio(value: float) -> str:
    """Format a ratio with two digits, because a few runs on a shared machine tell no more."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:#.2g}"
