"""The table of `engines.gpu_speed` and `gpu_apart`: pushes into real engines on GPUs in one run, by weightsync and by
the tools that people use instead.
"""

from __future__ import annotations

import statistics
from typing import Any

from bench.ways import ratio

__all__ = ["loaders"]

_BROADCAST = "NCCL broadcast, buckets"  # figure of `bench.gpu_broadcast` that pushes to other GPUs are compared with

_OURS = (
    "plugin",
    "extension",
    "plugin in place",
    "extension in place",
    "plugin delivered",
    "reference",
    "reference in place",
)  # ways through our plugin, which the engine's other ways are compared with
_LONG = 0.2  # seconds from which on two digits are enough
_LEAST = 0.0095  # seconds: shorter phases are not shown


def loaders(document: dict[str, Any], table: Any) -> list[str]:
    """Return lines of Markdown. `table` makes lines from columns and rows."""
    engines = list(dict.fromkeys(way["engine"] for way in document["ways"]))
    found = [way for way in document["ways"] if "seconds_each" in way]
    found.sort(key=lambda way: engines.index(way["engine"]))
    medians = [statistics.median(counted(way)[0]) for way in found]
    broadcasts = document.get("broadcasts", {})
    rows = []
    for way, median in zip(found, medians, strict=True):
        each, warm = counted(way)
        beside = [(w, m) for w, m in zip(found, medians, strict=True) if w["engine"] == way["engine"]]
        ours = next((m for w, m in beside if w["way"] in _OURS), None)
        digits = 2 if median >= _LONG else 3
        spread = f"{median:.{digits}f} ({min(each):.{digits}f}–{max(each):.{digits}f}) s"
        rows.append(
            [
                way["engine"],
                name(way),
                f"**{spread}**" if median == min(m for _, m in beside) else spread,
                str(len(each)),
                ratio(median / ours) if ours else "–",
                f"{way['until_filled']:.{digits}f} s",
                f"{way['checked'][-1]:,} of {way['tensors']:,} tensors" if way["checked"][-1] else "none",
                phases(way["phases"]),
                " / ".join(f"{seconds:.1f}" for seconds in warm) + " s",
            ]
        )
        if broadcasts:
            rate = way["bytes"] / median / 1e9
            rows[-1] += [f"{rate:.0f} GB/s", f"{rate / broadcasts[_BROADCAST]:.2f}"]
    columns = [
        "engine", "way", "median (least–most)", "pushes", "time, of our plugin's", "trainer held up", "bytes checked",
        "phases", "pushes before these",
    ]  # fmt: skip
    columns += ["bytes a second", "of an NCCL broadcast"] if broadcasts else []
    some = found[0]
    lines = [
        f"{some['bytes'] / 1e9:.1f} GB, {some['tensors']:,} tensors, into engines of TP {some['tp']}; "
        f"{document['gpu']}, torch {document['torch']}.",
        "",
        *table(columns, rows),
        "",
    ]
    notes = [note(way) for way in document["ways"]]
    lines += [*filter(None, notes), ""] if any(notes) else []
    if ceilings := document.get("ceilings"):
        kept = {key: f"{value:.0f} GB/s" for key, value in ceilings.items() if "a launch each" not in key}
        lines += [f"Plain copies in the same run: {', '.join(f'{key} {value}' for key, value in kept.items())}.", ""]
    if broadcasts:
        said = ", ".join(f"{key} {value:.0f} GB/s" for key, value in broadcasts.items())
        lines += [f"Between a trainer's GPU and a server's in the same run, all pairs at once: {said}.", ""]
    command = document["command"]
    return [*lines, f"`{command if isinstance(command, str) else ' '.join(command)}`"]


def counted(way: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Return the seconds of the pushes that count, and of the pushes that warmed up."""
    each = way["seconds_each"]
    warm = way.get("warm", 4 if way["way"] in _OURS else 1)  # files without the number are of runs with these numbers
    return (each[warm:], each[:warm]) if each[warm:] else (each[-1:], each[:-1])


def name(way: dict[str, Any]) -> str:
    """Return the name of a way as readers know it."""
    if way.get("peer"):
        return str(way["way"])
    if way["way"].startswith("reference"):
        return "weightsync, in place" if way["way"].endswith("in place") else "weightsync"
    if way["way"].endswith("in place"):
        return "weightsync, our plugin, in place"
    if way["way"].endswith("delivered"):
        return "weightsync, our plugin, delivered between two nodes"
    return "weightsync, our plugin" if way["way"] in _OURS else f"weightsync, stock server (`{way['way']}`)"


def phases(found: dict[str, float]) -> str:
    """Return the phases that take noticeable time, in milliseconds."""
    return ", ".join(f"{phase} {seconds * 1e3:,.0f}" for phase, seconds in found.items() if seconds >= _LEAST) + " ms"


def note(way: dict[str, Any]) -> str:
    """Say what a peer was, or that a way failed; "" for our own ways that went well."""
    if "seconds_each" not in way:
        return f"- {way['way']} into {way['engine']}: failed in this run"
    if not way.get("peer"):
        return ""
    before = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in way.get("before", {}).items())
    after = f"; before the pushes: {before}" if before else ""
    return f"- {way['way']} into {way['engine']}: {way['software']}, {way['settings']}{after}"
