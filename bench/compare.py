"""Compares two pytest-benchmark files: how many times as long does everything take now?

\b
    python -m bench compare NOW.json [BASELINE.json] [--fail-above 1.5]

Without --fail-above the ratios are shown and not judged: if the machines differ or one was busy, a ratio is about the
machines. The least times are compared, because other work disturbs these least.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from bench.harness import suite
from weightsync.errors import ConfigError

BASELINE = Path(__file__).resolve().parent.parent / "docs/benchmarks/cpu/pure.json"


class Row(NamedTuple):
    """One benchmark in both files; seconds."""

    name: str
    before: float | None  # None: it is new
    now: float | None  # None: it is gone

    @property
    def ratio(self) -> float | None:
        return self.now / self.before if self.before and self.now else None


def read(path: Path) -> dict[str, Any]:
    """Read a file of pytest-benchmark. Raises `ConfigError`."""
    try:
        document: dict[str, Any] = json.loads(path.read_bytes())
        if not {"machine_info", "benchmarks"} <= document.keys():
            raise ValueError("no machine_info, no benchmarks")
    except (OSError, ValueError, AttributeError) as error:
        why = f"{path} is no file of pytest-benchmark: {error}"
        raise ConfigError(why, hint="`make bench-pure` writes one") from error
    return document


def compare(before: dict[str, Any], now: dict[str, Any]) -> list[Row]:
    """Return a row for every benchmark of either file, in the order of `now`."""
    old, new = ({one["fullname"]: one["stats"]["min"] for one in file["benchmarks"]} for file in (before, now))
    return [Row(name.rpartition("::")[2], old.get(name), new.get(name)) for name in dict.fromkeys([*new, *old])]


def machine(document: dict[str, Any]) -> str:
    """Return the machine that a file was measured on."""
    info = document["machine_info"]
    cpu = info.get("cpu", {})
    return f"{info.get('node', '?')}: {cpu.get('count', '?')} x {cpu.get('brand_raw', '?')}, {info.get('release', '?')}"


def main(
    now: Annotated[Path, typer.Argument(help="What was measured now.", show_default=False)],
    before: Annotated[Path, typer.Argument(help="What it is set beside.")] = BASELINE,
    fail_above: Annotated[
        float | None, typer.Option(help="Exit with status 1 if a ratio is above this.", show_default=False)
    ] = None,
) -> None:
    """Print the table, and fail if a ratio is above `fail_above`."""
    files = read(before), read(now)
    rows = compare(*files)
    table = Table(title=f"before: {machine(files[0])}\nnow: {machine(files[1])}")
    for column in ("", "before", "now", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        ratio = "–" if row.ratio is None else f"{row.ratio:.2f}"
        table.add_row(row.name, *("–" if s is None else f"{s * 1e3:.3f} ms" for s in (row.before, row.now)), ratio)
    Console().print(table)
    worse = [row for row in rows if fail_above is not None and row.ratio is not None and row.ratio > fail_above]
    if worse:
        typer.echo(f"above {fail_above:g} times: {', '.join(row.name for row in worse)}", err=True)
        raise typer.Exit(1)


app = suite(main)
if __name__ == "__main__":
    app()
