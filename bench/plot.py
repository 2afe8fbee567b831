"""Pictures of JSON files: seconds of the ways of `push` and `sglang`, speeds of `transports`.

\b
    python -m bench plot docs/benchmarks/cpu/transports.json --out transports.svg

Needs matplotlib: `pip install matplotlib`, which `make setup` has done.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.harness import suite
from weightsync.errors import ConfigError

__all__ = ["draw"]

Document = dict[str, Any]


def draw(document: Document, out: Path) -> None:
    """Write a picture; the name's ending says of which kind. Raises `ConfigError` for figures that have none."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figures = document["figures"]
    kind = next((name for name in ("ways", "transports") if isinstance(figures, dict) and name in figures), None)
    if kind is None:
        raise ConfigError(f"{document['title']!r} has no picture", hint="`push`, `sglang` and `transports` have")
    picture, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    {"ways": _ways, "transports": _transports}[kind](axes, figures)
    axes.set_title(document["title"], fontsize="medium")
    picture.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    pyplot.close(picture)


def _ways(axes: Any, figures: Document) -> None:
    names = [way["name"] for way in figures["ways"]]
    middle = [way["seconds"]["p50"] for way in figures["ways"]]
    longest = [way["seconds"]["max"] - way["seconds"]["p50"] for way in figures["ways"]]
    axes.barh(names, middle, xerr=[[0.0] * len(names), longest], capsize=4)
    for name, key in (("trainer blocked", "blocked"), ("engine paused", "paused")):
        seconds = [way[key]["p50"] if way[key] else None for way in figures["ways"]]
        axes.plot(seconds, names, marker="|" if key == "blocked" else "x", linestyle="", color="black", label=name)
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds for {figures['bytes'] / 1e9:.2f} GB: median, to the longest")
    axes.legend()


def _transports(axes: Any, figures: Document) -> None:
    for name in dict.fromkeys(one["transport"] for one in figures["transports"]):
        points = [one for one in figures["transports"] if one["transport"] == name]
        axes.plot([one["nbytes"] for one in points], [one["gb_per_s"] for one in points], marker="o", label=name)
    axes.axhline(figures["copy_ceiling_gb_per_s"], linestyle="--", color="grey", label="one core copies")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("bytes of a bucket")
    axes.set_ylabel("GB/s")
    axes.legend()


def main(
    files: Annotated[list[Path], typer.Argument(help="JSON that a suite has written.", show_default=False)],
    out: Annotated[Path, typer.Option(help="x.png or x.svg; for several files, a folder for SVGs.")] = Path(),
) -> None:
    """Draw."""
    for path in files:
        try:
            document = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        target = out if out.suffix in (".png", ".svg") else out / f"{path.stem}.svg"
        target.parent.mkdir(parents=True, exist_ok=True)
        draw(document, target)
        typer.echo(target)


app = suite(main)
if __name__ == "__main__":
    app()
