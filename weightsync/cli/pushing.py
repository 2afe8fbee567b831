"""`weightsync demo`, `push` and `keygen`."""

from __future__ import annotations

import json
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer

from weightsync.cli.options import DaemonOption, JsonOption, app

if TYPE_CHECKING:
    from weightsync.report import PushReport

_INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it


@app.command()
def demo(
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Optimiser steps, with a push after each.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Show the whole thing on this machine: two FSDP2 ranks train and push into three engines on two nodes.

    Builds a small dense and a small mixture-of-experts model, starts real daemons and engines (tensor parallel 1 and
    2, and 2 on a second node), and after each step compares every engine with the trainer: checksums of what lies in
    each tensor-parallel rank, and greedy tokens. Needs no GPU, no download, and leaves nothing behind.
    """
    from rich.console import Console

    from weightsync.demo.show import run_demo

    console = Console(stderr=as_json, highlight=False)
    result = run_demo(console, steps=steps)
    if as_json:
        typer.echo(json.dumps(result.as_dict()))
    else:
        good = sum(push["equal"] for push in result.pushes)
        console.print(
            f"\n{good} of {len(result.pushes)} pushes equal on every engine and rank, in {result.seconds:.0f} s; "
            f"left behind: {', '.join(result.left_behind) or 'nothing'}"
        )
    raise typer.Exit(0 if result.ok else 1)


@app.command()
def push(
    checkpoint: Annotated[
        Path, typer.Argument(help="A safetensors directory in Hugging Face form.", show_default=False)
    ],
    version: Annotated[int, typer.Option(min=0, help="Must be above what the engines serve.", show_default=False)],
    model: Annotated[str, typer.Option(help="Which engines: their `model` in the node config.")] = "default",
    daemon: DaemonOption = None,
    pause: Annotated[str, typer.Option(help="Requests in flight: keep, wait, abort or none.")] = "keep",
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for the whole push.")] = 600.0,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Send these tensors only: a name or a pattern such as 'model.layers.*'; several times."),
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(metavar="OLD=NEW", help="Send a tensor under another name; several times."),
    ] = None,
    quantise: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Send float8 with scales, like this fp8 checkpoint.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Push a checkpoint directory to every engine of a model. Streamed: needs memory for a few buckets, not the
    model.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from weightsync.sources import CheckpointSource
    from weightsync.trainer.client import push_source

    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    try:
        with CheckpointSource(checkpoint) as source, Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("filling", total=None)
            report: PushReport = push_source(
                source,
                version=version,
                model=model,
                daemon=daemon,
                pause=pause,
                timeout=timeout,
                only=only or None,
                rename=_names_given(rename or []) or None,
                quantise=quantise,
                on_progress=lambda done, of: progress.update(
                    bar, completed=done, total=of, description="filling" if done < of else "engines finish"
                ),
            )
    except KeyboardInterrupt:
        typer.echo("weightsync: interrupted; the push is aborted, and `weightsync status` shows every engine", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    typer.echo(json.dumps(report.as_dict()) if as_json else str(report))
    raise typer.Exit(0 if report.complete else 1)


def _names_given(pairs: list[str]) -> dict[str, str]:
    """Return {OLD: NEW} from the `--rename` options."""
    names: dict[str, str] = {}
    for pair in pairs:
        old, equals, new = pair.partition("=")
        if not (old and equals and new) or old in names:
            why = "is the second for this tensor" if old in names else "is not OLD=NEW"
            raise typer.BadParameter(f"{pair!r} {why}", param_hint="--rename")
        names[old] = new
    return names


@app.command()
def keygen(
    file: Annotated[Path, typer.Argument(help="A new file, which only you can read.", show_default=False)],
) -> None:
    """Make the key that lets weightsyncd of several machines talk to each other.

    Give the file to every node, readable by weightsyncd alone, and name it there: [cluster] key_file = "FILE". Whoever
    has it may push weights into every engine.
    """
    from weightsync.wire.keys import make_key_file

    make_key_file(file)
    typer.echo(f'{file}: a new key. On every node: [cluster] key_file = "{file.resolve()}"')
