"""`weightsync status` and `trace`: how a weightsyncd is, and what its pushes did."""

from __future__ import annotations

import contextlib
import json
import select
import time
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated, Any

import msgspec
import typer

from weightsync.cli.options import DaemonOption, JsonOption, app
from weightsync.endpoints import default_endpoint
from weightsync.errors import ConfigError, DaemonLost


@app.command()
def status(
    daemon: DaemonOption = None,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every second until Ctrl-C.")] = False,
    as_json: JsonOption = False,
) -> None:
    """How a weightsyncd is: its engines and what they serve, its bridges, the push under way and the last one."""
    endpoint = daemon or default_endpoint()
    if as_json:
        typer.echo(json.dumps(fetch(endpoint)))
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not watch:
        console.print(_status_view(endpoint))
        return
    from rich.live import Live

    with (
        contextlib.suppress(KeyboardInterrupt),
        Live(_watched(endpoint), console=console, refresh_per_second=4, vertical_overflow="visible") as live,
    ):
        while True:
            select.select([], [], [], 1.0)
            live.update(_watched(endpoint))


@app.command()
def trace(
    file: Annotated[
        Path | None,
        typer.Argument(help="A trace that was written before; nothing is asked of a daemon.", show_default=False),
    ] = None,
    model: Annotated[str, typer.Option(help="Whose pushes.  [default: of the newest]", show_default=False)] = "",
    failed: Annotated[bool, typer.Option("--failed", help="The last push that failed, not the last.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write it there, for ui.perfetto.dev.", show_default=False)
    ] = None,
    daemon: DaemonOption = None,
    as_json: JsonOption = False,
) -> None:
    """Where a push spent its time: the one under way, or else the last that began on this node.

    Every rank, bridge and engine on one time axis: with -o as a file that ui.perfetto.dev and chrome://tracing open,
    here as a table of steps and one of engines. weightsyncd keeps the last push of each model and the last that failed.
    """
    from rich.console import Console

    from weightsync.cli.trace_summary import read_trace, summarise, summary_view
    from weightsync.operator import fetch_trace

    try:
        text = file.read_bytes() if file is not None else None
        if text is None:
            text = fetch_trace(daemon or default_endpoint(), model=model, failed=failed).document
        if output is not None:
            output.write_bytes(text)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from error
    summary = summarise(read_trace(text, str(file or "the answer")))
    if as_json:
        typer.echo(json.dumps(summary))
        return
    Console(highlight=False, markup=False).print(summary_view(summary))
    if output is not None:
        typer.echo(f"\nwritten to {output}: open it at ui.perfetto.dev or chrome://tracing")


def fetch(endpoint: str) -> dict[str, Any]:
    """Return the status of a daemon, as plain data."""
    from weightsync.operator import fetch_status

    plain: dict[str, Any] = msgspec.to_builtins(fetch_status(endpoint))
    plain.pop("type", None)
    plain.pop("id", None)
    for engine in (plain.get("last") or {}).get("engines", ()):
        engine["not_pushed"] = engine.pop("untouched", 0)  # the name in reports; on the wire the field keeps its first
    return plain


def _status_view(endpoint: str) -> Any:
    from weightsync.cli.status_view import status_view

    return status_view(fetch(endpoint), time.strftime("%H:%M:%S"))


def _watched(endpoint: str) -> Any:
    """Return the status view, or the error if the daemon does not answer: it may be back in the next second."""
    from rich.text import Text

    try:
        return _status_view(endpoint)
    except DaemonLost as error:
        return Text(f"{time.strftime('%H:%M:%S')} {error}")
