"""`weightsync bench`."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import typer  # noqa: TC002 - typer itself reads the annotations

from weightsync.cli.options import app
from weightsync.errors import ConfigError


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def bench(context: typer.Context) -> None:
    """How fast pushes are here, beside what this machine can do and what you would use instead.

    Only where weightsync runs from its source tree: the benchmarks are not in the installed package.
    """
    tree = Path(__file__).resolve().parents[2]
    if not all((tree / name).is_file() for name in ("pyproject.toml", "bench/cli.py")):
        raise ConfigError(
            f"the benchmarks are not in the installed package ({tree})",
            hint="in a clone of the source tree: `make setup`, then `.venv/bin/weightsync bench`, or `python -m bench`",
        )
    sys.path.insert(0, str(tree))  # `bench` is not an installed package
    import_module("bench.cli").app(args=context.args, prog_name=context.command_path)
