"""Draws pictures of JSON files: seconds of the ways of `push` and `sglang`, speeds of `transports`.

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
from bench.ways import extent
from weightsync.errors import ConfigError

__all__ = ["draw"]

Document = dict[str, Any]


def draw(document: Document, out: Path) -> None:
    """Write a picture, in the format of the name's ending. Raises `ConfigError` for figures that have no picture."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    title: str = document.get("title", "this")
    figures: Any = document.get("figures")
    kind = next((name for name in ("ways", "transports") if isinstance(figures, dict) and name in figures), None)
    if kind is None:
        raise ConfigError(f"{title!r} has no picture", hint="`push`, `sglang` and `transports` have")
    picture, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    try:
        {"ways": _ways, "transports": _transports}[kind](axes, figures)
        axes.set_title(title, fontsize="medium")
        picture.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{title!r} lacks figures for a picture: {error!r}") from error
    finally:
        pyplot.close(picture)


def _ways(axes: Any, figures: Document) -> None:
    names = [way["name"] for way in figures["ways"]]
    middle = [way["seconds"]["p50"] for way in figures["ways"]]
    ends = zip(middle, (extent(way["seconds"]) for way in figures["ways"]), strict=True)
    spread = [(p50 - least, most - p50) for p50, (least, most) in ends]
    axes.barh(names, middle, xerr=list(zip(*spread, strict=True)), capsize=4)
    for name, key in (("trainer blocked", "blocked"), ("engine paused", "paused")):
        seconds = [way[key]["p50"] if way[key] else None for way in figures["ways"]]
        axes.plot(seconds, names, marker="|" if key == "blocked" else "x", linestyle="", color="black", label=name)
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds for {figures['bytes'] / 1e9:.2f} GB: median, from the shortest to the longest")
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
    """Draw a picture of each file."""
    targets = [out if out.suffix in (".png", ".svg") else out / f"{path.stem}.svg" for path in files]
    if twice := sorted({str(target) for target in targets if targets.count(target) > 1}):
        raise ConfigError(f"several files would be drawn as {', '.join(twice)}", hint="give each an --out of its own")
    documents = [_read(path) for path in files]
    for path, document, target in zip(files, documents, targets, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            draw(document, target)
        except ConfigError as error:
            if len(files) == 1:
                raise
            typer.echo(f"{path} left out: {error}", err=True)
        else:
            typer.echo(target)


def _read(path: Path) -> Document:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} is not what a suite has written")
    return document


app = suite(main)
if __name__ == "__main__":
    app()
