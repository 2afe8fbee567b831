"""`python -m bench`, and `weightsync bench` in a source tree: every measurement, its table, its plots.

Each suite is a module with its own options, imported only when that suite is run.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer

from weightsync.errors import WeightSyncError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["app", "main"]

SUITES = {
    "transports": "One bucket over shm and gloo, for sizes of 1 MiB to 1 GiB.",
    "push": "Whole pushes of a published model's shapes, beside a plain torch.distributed broadcast.",
    "small": "Pushes of one small tensor: what a push takes whatever its bytes.",
    "control": "Processor time that a bucket costs beside its bytes, by process.",
    "describe": "What a rank does before a push: names, types, shapes, addresses.",
    "plan": "Planning the push of a published model, or of a million shards.",
    "megatron": "As describe, for a Megatron rank; needs weightsync[megatron].",
    "sglang": "Pushes into a real SGLang server (CPU), beside SGLang's own tensor path; needs `make engines`.",
    "gpu": "Pushes between the GPUs of this host, beside what its wires can do; needs GPUs.",
}
ALL = ("describe", "plan", "transports", "control", "small", "push")  # suites that any machine runs in minutes
TOOLS = {
    "models": "The models whose shapes come along: tensors and bytes of each.",
    "compare": "Two pytest-benchmark files (`make bench-pure`), as ratios.",
    "table": "Write the measured parts of docs/benchmarks.md from their JSON.",
    "plot": "PNG or SVG of JSON files.",
}
_FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="How fast weightsync is here, beside what this machine can do and what you would use instead. Every suite "
    "measures its ceiling in the same run. Try `plan`, then `push --layers 4 --way push --way broadcast`; "
    "`NAME --help` has each one's options.",
)


def _forward(module: str) -> Callable[[typer.Context], None]:
    def run(context: typer.Context) -> None:
        sys.argv = [context.command_path, *context.args]  # where argparse looks
        found = importlib.import_module(module)
        if hasattr(found, "app"):
            found.app(args=context.args, prog_name=context.command_path)
        else:
            found.main()

    return run


for _name, _line in (SUITES | TOOLS).items():
    _module = f"bench.bench_{_name}" if _name in SUITES else f"bench.{_name}"
    app.command(_name, help=_line, short_help=_line, context_settings=_FORWARD)(_forward(_module))


@app.command("all")
def run_all(
    json_dir: Annotated[
        Path | None, typer.Option(help="Write NAME.json for each suite into this folder.", show_default=False)
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Run this one; several times.", show_default=False)] = None,
) -> None:
    """Run every suite that needs no GPU and no engine, each in a process of its own, so that none warms another up."""
    if unknown := set(only or ()) - set(SUITES):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: suites are {', '.join(SUITES)}", param_hint="--only")
    failed = []
    for name in only or ALL:
        command = [sys.executable, "-m", "bench", name]
        if json_dir is not None:
            json_dir.mkdir(parents=True, exist_ok=True)
            command += ["--json", str(json_dir / f"{name}.json")]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        typer.echo(f"failed: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


def main() -> None:
    """Run the command line. An error is told in words, with exit status 1."""
    try:
        app(prog_name="python -m bench")
    except WeightSyncError as error:
        typer.echo(f"bench: {error}", err=True)
        raise SystemExit(1) from None
