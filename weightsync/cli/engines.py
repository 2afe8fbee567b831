"""`weightsync engines`, with `add` and `remove`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import msgspec
import typer

from weightsync.cli.looking import fetch
from weightsync.cli.options import CaFileOption, DaemonOption, JsonOption, app
from weightsync.endpoints import default_endpoint
from weightsync.errors import ConfigError

engines_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(engines_app, name="engines")


@engines_app.callback()
def engines(
    context: typer.Context,
    daemon: DaemonOption = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show which tensors replay, and why others do not.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Every engine a weightsyncd reaches: what it is, which protocol was chosen for it and why, what it serves. `add`
    and `remove` change the engines of its own node.
    """
    context.obj = daemon or default_endpoint()
    if context.invoked_subcommand is None and plan and not as_json:
        from rich.console import Console

        from weightsync.cli.views import replay_details

        Console(highlight=False).print(replay_details(fetch(context.obj)["engines"]))
    elif context.invoked_subcommand is None:
        _show_engines(fetch(context.obj)["engines"], as_json=as_json)


@engines_app.command()
def add(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Unique over all nodes.", show_default=False)],
    url: Annotated[str, typer.Option(help="The engine's own URL.", show_default=False)],
    kind: Annotated[str, typer.Option(help="vllm, sglang or reference.", show_default=False)],
    model: Annotated[str, typer.Option(help="Which pushes it takes.")] = "default",
    path: Annotated[str, typer.Option(help="The way into it.")] = "auto",
    target: Annotated[str, typer.Option(help="all, model or draft: which of its models.")] = "all",
    api_key_env: Annotated[
        str | None, typer.Option(help="Variable of weightsyncd's environment that holds its key.", show_default=False)
    ] = None,
    ca_file: CaFileOption = None,
    frozen: Annotated[bool, typer.Option("--frozen", help="Look after it, and never push to it.")] = False,
    daemon: DaemonOption = None,
    as_json: JsonOption = False,
) -> None:
    """Have the weightsyncd of this node push into one more engine, as soon as no push is under way.

    This lasts until weightsyncd is restarted, or told by SIGHUP to read its config again: add the engine there too.
    """
    from weightsync.config import EngineConfig
    from weightsync.operator import change_engines

    fields = {"name": name, "kind": kind, "url": url, "model": model, "path": path, "target": target}
    try:
        more = {"api_key_env": api_key_env, "ca_file": ca_file, "frozen": frozen}
        engine = msgspec.convert(fields | more, EngineConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"invalid engine: {error}") from error
    found = change_engines(daemon or context.obj, add=[engine])
    _show_engines(msgspec.to_builtins(found), as_json=as_json)


@engines_app.command()
def remove(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="As in `weightsync engines`.", show_default=False)],
    daemon: DaemonOption = None,
) -> None:
    """Have the weightsyncd of this node leave an engine alone from now on, as soon as no push is under way.

    The engine itself is not touched. This lasts until weightsyncd is restarted, or told by SIGHUP to read its config
    again.
    """
    from weightsync.operator import change_engines

    change_engines(daemon or context.obj, remove=[name])
    typer.echo(f"{name} is no longer an engine of this node")


def _show_engines(found: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(found))
        return
    from rich.console import Console

    from weightsync.cli.views import engine_details

    Console(highlight=False).print(engine_details(found))
