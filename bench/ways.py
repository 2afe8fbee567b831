"""What every way to bring weights into engines is reported as, so that they stand in one table."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bench.harness import Spread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["COLUMNS", "Way", "fastest", "in_turn", "load", "rows"]

COLUMNS = (
    "way", "p50", "p99", "max", "GB/s", "of memcpy", "time / first", "trainer blocked", "engine paused", "peak memory",
    "bytes checked",
)  # fmt: skip
_LEVEL = 0.03  # medians that differ by less are equal


@dataclass(frozen=True)
class Way:
    """One way, run several times. Seconds and bytes."""

    name: str
    software: str  # what carried the bytes, with its version and settings
    seconds: Spread  # from the first rank's call until every engine has the weights
    blocked: Spread | None  # how long the trainer's weights may not change
    paused: Spread | None  # how long an engine does not serve; None: nobody pauses it
    checked: str  # which bytes were compared with the trainer's
    peak: dict[str, int]  # the most memory that a process of each kind had resident
    copied: int = 0  # bytes, each as often as it is copied from host memory to host memory; 0 where it is not known
    phases: dict[str, float] = field(default_factory=dict)  # medians
    load: tuple[float, ...] = ()  # processes that wanted a core in the minute before, each time that it was run


def load() -> float:
    """How many processes wanted a core in the last minute."""
    return round(os.getloadavg()[0], 2)


def in_turn(ways: Sequence[Callable[[int], Way]], rounds: int) -> list[Way]:
    """Run all ways so often, in turn, so that what else the machine does meets them alike; each gets its round."""
    found = [[way(turn) for way in ways] for turn in range(rounds)]
    return [_together(one) for one in zip(*found, strict=True)]


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
    """Of ways as their JSON has them: each for `nbytes` of weights, `ceiling` in bytes a second. The first is ours."""
    first = ways[0]["seconds"]["p50"]
    found = []
    for way in ways:
        seconds = way["seconds"]
        peak = ", ".join(f"{name} {held / 1e6:,.0f}" for name, held in way["peak"].items())
        of_copy = f"{way['copied'] / seconds['p50'] / ceiling:.2f}" if way["copied"] else "–"
        found.append(
            [
                way["name"],
                *(f"{seconds[key]:.3f} s" for key in ("p50", "p99", "max")),
                f"{nbytes / seconds['p50'] / 1e9:.2f}",
                of_copy,
                f"{seconds['p50'] / first:.2f}",
                *(f"{way[key]['p50']:.3f} s" if way[key] else "–" for key in ("blocked", "paused")),
                f"{peak} MB",
                way["checked"],
            ]
        )
    return found


def fastest(ways: Sequence[Mapping[str, Any]]) -> str:
    """One sentence that says which way took the least time, ours or not."""
    ordered = sorted(ways, key=lambda way: way["seconds"]["p50"])
    best, level = ordered[0], ordered[0]["seconds"]["p50"] * (1 + _LEVEL)
    others = [way["name"] for way in ordered[1:] if way["seconds"]["p50"] <= level]
    return f"Fastest: {best['name']}{', level with ' + ', '.join(others) if others else ''}."
