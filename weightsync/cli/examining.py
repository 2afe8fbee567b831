"""`weightsync doctor`."""

from __future__ import annotations

import json
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated, Any

import msgspec
import typer

from weightsync.cli.options import CaFileOption, JsonOption, app
from weightsync.errors import ConfigError

_MACHINE = "this machine"


@app.command()
def doctor(
    engine: Annotated[str | None, typer.Option(help="The engine's own URL.", show_default=False)] = None,
    node_config: Annotated[
        Path | None, typer.Option(help="Look at this node and every engine of it instead.", show_default=False)
    ] = None,
    kind: Annotated[str, typer.Option(help="vllm, sglang or reference; auto asks the engine.")] = "auto",
    path: Annotated[str, typer.Option(help="The way into it that you mean to use.")] = "auto",
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable that holds its key.", show_default=False)
    ] = None,
    ca_file: CaFileOption = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for each engine's answers.")] = 10.0,
    as_json: JsonOption = False,
) -> None:
    """What would keep a node and its engines from taking weights, and the exact flag or variable that mends it.

    Looks at the node and engines of a config, at one engine or, without either, at this machine alone. Run it where
    weightsyncd runs, as its user. Changes nothing. The exit status is 1 if something would fail.
    """
    from weightsync.config import EngineConfig, NodeConfig, load_node_config
    from weightsync.doctor import examine, examine_machine, examine_node, worst_first

    if engine is not None and node_config is not None:
        raise ConfigError("either --engine URL, or --node-config FILE for all of a node's engines")
    found, titles, node = {}, {}, None
    specs: tuple[EngineConfig, ...] = ()
    if engine is None:
        config = load_node_config(node_config) if node_config is not None else NodeConfig()
        here = f"node {config.node.name}" if node_config is not None else _MACHINE  # no engine's name has a space
        node, judged = examine_node(config)
        found[here] = worst_first([*judged, *examine_machine(node.config)])
        titles[here] = f"{here} of {node_config}" if node_config is not None else here
        specs = config.engines
    else:
        spec = EngineConfig(name="engine", kind=kind, url=engine, path=path, api_key_env=api_key_env, ca_file=ca_file)
        specs = (spec,)
    for spec in specs:
        found[spec.name] = examine(spec, node, timeout=timeout)
        titles[spec.name] = f"{spec.name} at {spec.url}"
    if as_json:
        typer.echo(json.dumps(msgspec.to_builtins(found if engine is None else found["engine"])))
    else:
        _show_findings(titles, msgspec.to_builtins(found))
    raise typer.Exit(1 if any(f.level == "fail" for findings in found.values() for f in findings) else 0)


def _show_findings(titles: dict[str, str], found: dict[str, list[dict[str, Any]]]) -> None:
    from rich.console import Console

    from weightsync.cli.views import findings_view

    console = Console(highlight=False, markup=False)  # some fixes contain square brackets
    for name, findings in found.items():
        console.print(titles[name])
        console.print(findings_view(findings))
