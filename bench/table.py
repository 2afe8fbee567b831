"""The measured parts of docs/benchmarks.md, from the JSON files beside it: `python -m bench table [--check]`.

The function of KIND writes the text between `<!-- bench: KIND FILE -->` and `<!-- end -->`, from FILE in
docs/benchmarks. The rest of the page is left as it is.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.compare import machine
from bench.harness import suite
from bench.loaders import loaders
from bench.ways import extent, fastest, ratio
from weightsync.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["main", "render"]

PAGE = Path(__file__).resolve().parent.parent / "docs/benchmarks.md"
_PART = re.compile(r"(<!-- bench: (\S+) (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
Document = dict[str, Any]


def render(page: str, folder: Path) -> str:
    """Return the page with every measured part made anew. Raises `ConfigError` for a part that cannot be made."""

    def part(found: re.Match[str]) -> str:
        begin, kind, name, _, end = found.groups()
        if kind not in KINDS:
            raise ConfigError(f"nothing writes parts of kind {kind!r}", hint=f"kinds are {', '.join(KINDS)}")
        try:
            document = json.loads((folder / name).read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder / name} cannot be read: {error}") from error
        return "\n".join([begin.rstrip("\n"), "", *KINDS[kind](document), "", end])

    return _PART.sub(part, page)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def ways(document: Document) -> list[str]:
    """Tabulate ways to bring the same weights into the same engines, in one run."""
    figures = document["figures"]
    found, nbytes, ceiling = figures["ways"], figures["bytes"], figures["memcpy_bytes_per_second"]
    best = min(way["seconds"]["p50"] for way in found)
    rows = []
    for way in found:
        seconds = way["seconds"]
        least, most = extent(seconds)
        spread = f"{seconds['p50']:.2f} ({least:.2f}–{most:.2f}) s"
        rows.append(
            [
                way["name"],
                f"**{spread}**" if seconds["p50"] == best else spread,
                ratio(seconds["p50"] / found[0]["seconds"]["p50"]),
                f"{nbytes / seconds['p50'] / 1e9:.2f} GB/s",
                ratio(way["copied"] / seconds["p50"] / ceiling) if way["copied"] else "–",
                *(f"{way[key]['p50']:.2f} s" if way[key] else "–" for key in ("blocked", "paused")),
                ", ".join(f"{name} {held / 1e6:,.0f}" for name, held in way["peak"].items()),
                way["checked"],
            ]
        )
    runs = found[0]["seconds"]["runs"]
    columns = (
        "way", f"p50 (min–max) of {runs}", "time, of the first", "bytes a second", "copies, of memcpy",
        "trainer blocked", "engine paused", "most memory of a process, MB", "bytes checked",
    )  # fmt: skip
    load = "; ".join(", ".join(f"{value:.1f}" for value in way["load"]) for way in found)
    return [
        f"{figures['model']}, layers: {figures['layers']}; {nbytes / 1e9:.2f} GB, {figures['tensors']:,} tensors. "
        f"Trainer ranks: {figures['ranks']}; engines: {figures['engines']}, of TP {figures['tp']}.",
        f"One core copies {ceiling / 1e9:.1f} GB/s in this run. Processes that wanted one of the "
        f"{document['hardware']['cores']} cores in the minute before each start of each way, ours too:",
        f"{load}.",
        "",
        *table(columns, rows),
        "",
        fastest(found),
        "",
        *(f"- {way['name']}: {way['software']}" for way in found),
        "",
        f"`{document['command']}`",
    ]


def first_push(document: Document) -> list[str]:
    """Tabulate the first file of pushes, which was measured before other ways were compared."""
    model, empty = document["figures"]["model"], document["figures"]["empty"]
    seconds = model["phases_median"]
    # files without the phase "export" count exports to the node's own engines as "wire"
    seconds = {"export": seconds["wire"], **seconds}
    phases = [f"{seconds[name] * 1e3:.0f}" for name in ("fill", "export", "load", "verify")]
    rows = [
        ["memcpy of one core, same run", f"{model['memcpy_bytes_per_second'] / 1e9:.2f} GB/s"],
        [f"push, median of {len(model['seconds'])}", f"{model['seconds_median']:.3f} s"],
        ["per copied byte, ratio to memcpy", f"**{model['ratio_to_memcpy']:.2f}**"],
        ["trainer blocked", f"{model['blocked_seconds_median']:.3f} s"],
        ["fill / export / load / verify (they overlap)", f"{' / '.join(phases)} ms"],
        [
            "push without bytes to two engines (refused by now; below, one small tensor instead), p50 / p99 of "
            f"{empty['pushes']}",
            f"**{empty['p50'] * 1e3:.1f} / {empty['p99'] * 1e3:.1f} ms**",
        ],
        [
            "memory of the daemon / of a bridge, without what is shared (arena, libraries)",
            f"{model['rss']['daemon'] / 1e6:.0f} / {model['rss']['bridge'] / 1e6:.0f} MB",
        ],
    ]
    return table(("what", "figure"), rows)


def small(document: Document) -> list[str]:
    """Tabulate pushes of one small tensor."""
    figures = document["figures"]
    seconds = figures["seconds"]
    spread = " / ".join(f"{seconds[key] * 1e3:.1f}" for key in ("p50", "p99", "max"))
    load = document["load"]["before"][0]
    words = f"p50 / p99 / max of {seconds['runs']}, {figures['engines']} engines, load {load:.1f} before"
    return table((f"a push of {figures['bytes']} bytes", "figure"), [[words, f"{spread} ms"]])


def transports(document: Document) -> list[str]:
    """Tabulate one bucket over each transport."""
    found: dict[str, dict[int, Any]] = {}
    for one in document["figures"]["transports"]:
        found.setdefault(one["transport"], {})[one["nbytes"]] = one
    rows = []
    for nbytes, shm in found["shm"].items():
        gloo = found["gloo"][nbytes]
        exchanges = [found[name][nbytes]["gb_per_s"] / gloo["gb_per_s"] for name in ("exchange", "exchange, runs")]
        size = f"{nbytes >> 30} GiB" if nbytes >> 30 else f"{nbytes >> 20} MiB"
        figures = (shm["ratio_per_copy"], gloo["gb_per_s"], gloo["ratio"], *exchanges)
        rows.append([size, f"{shm['gb_per_s']:.2f}", *(f"{figure:.2f}" for figure in figures)])
    columns = (
        "bucket", "shm GB/s", "per copied byte, of memcpy", "gloo GB/s", "gloo, of memcpy", "exchange, of gloo",
        "in runs, of gloo",
    )  # fmt: skip
    return table(columns, rows)


def describe(document: Document) -> list[str]:
    """Tabulate describing weights."""
    rows = [
        [f["case"], *(f"{f[key] * 1e3:.1f} ms" for key in ("first", "again", "located"))] for f in document["figures"]
    ]
    return table(("weights", "first time", "again", "addresses and strides"), rows)


def control(document: Document) -> list[str]:
    """Tabulate the processor time of a bucket."""
    figures = document["figures"]
    row = [f"{f['median'] * 1e3:.2f} ms" for f in figures]
    return table([f["process"] for f in figures], [row])


def plan(document: Document) -> list[str]:
    """Tabulate planning."""
    rows = [
        [
            f["case"],
            f"{f['shards']:,}",
            f"{f['buckets']:,}",
            f"{f['unpack']:.2f} s",
            f"{f['plan']:.2f} s",
            f"{f['known'] * 1e6:.1f} µs",
        ]
        for f in document["figures"]
    ]
    return table(("case", "shards", "buckets", "read layouts", "plan", "known plan"), rows)


def pure(document: Document) -> list[str]:
    """Tabulate the baseline of the pure parts."""
    rows = [
        [
            one["name"].removeprefix("test_").replace("_", " "),
            *(f"{one['stats'][key] * 1e3:.3f} ms" for key in ("min", "median")),
        ]
        for one in document["benchmarks"]
    ]
    return [f"Baseline: {machine(document)}.", "", *table(("what", "least", "median"), rows)]


KINDS: dict[str, Callable[[Document], list[str]]] = {
    "ways": ways,
    "first-push": first_push,
    "small": small,
    "transports": transports,
    "describe": describe,
    "control": control,
    "plan": plan,
    "pure": pure,
    "loaders": lambda document: loaders(document, table),
}


def main(
    page: Annotated[Path, typer.Argument(help="The page; its JSON is in a folder of its name.")] = PAGE,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit with status 1 if it is not so.")] = False,
) -> None:
    """Write the page, or check it."""
    before = page.read_text()
    after = render(before, page.with_suffix(""))
    if check and before != after:
        typer.echo(f"{page} is not what its JSON gives: run `python -m bench table`", err=True)
        raise typer.Exit(1)
    if not check:
        page.write_text(after)


app = suite(main)
if __name__ == "__main__":
    app()
