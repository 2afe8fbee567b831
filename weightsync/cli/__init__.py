"""`weightsync`, the operator's command line. Try `weightsync demo` first.

pushing     demo, push, keygen
looking     status, trace
engines     engines, engines add, engines remove
examining   doctor
measuring   bench

views, status_view and trace_summary make what the commands print, from the plain data of `--json`
"""

from __future__ import annotations

import typer

from weightsync.cli import engines, examining, looking, measuring, pushing
from weightsync.cli.options import app
from weightsync.errors import WeightSyncError

__all__ = ["app", "engines", "examining", "looking", "main", "measuring", "pushing"]


def main() -> None:
    """Entry point of the console script. Errors are printed without a traceback, exit status 1; 130 after Ctrl-C."""
    try:
        app()
    except WeightSyncError as error:
        typer.echo(f"weightsync: {error}", err=True)
        raise SystemExit(1) from None
