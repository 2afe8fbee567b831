"""`weightsync`: the operator's hand. Try `weightsync demo` first."""

from __future__ import annotations

import contextlib
import json
import select
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from weightsync.endpoints import default_endpoint
from weightsync.errors import ConfigError, WeightSyncError

if TYPE_CHECKING:
    from weightsync.report import PushReport

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="New policy weights into every inference engine. `demo` shows it all on this machine; `push` sends a "
    "checkpoint directory; `status` and `engines` look at a running weightsyncd; `doctor` says what an engine lacks; "
    "`bench` measures.",
)

engines_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(engines_app, name="engines")

_INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it

DaemonOption = Annotated[
    str | None,
    typer.Option(
        "--daemon",
        envvar="WEIGHTSYNC_DAEMON",
        help="Endpoint of the node's weightsyncd, such as ipc:///path/to.sock.  [default: the user's own socket]",
        show_default=False,
    ),
]
CaFileOption = Annotated[str | None, typer.Option(help="Certificates (PEM) for an https URL.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


@app.command()
def demo(
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Optimiser steps, with a push after each.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Show the main job on this machine: two FSDP2 ranks train and push into three engines on two nodes.

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

    from weightsync.client import push_source
    from weightsync.sources import CheckpointSource, source_of

    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    try:
        with CheckpointSource(checkpoint) as stored, Progress(*columns, console=console, transient=True) as progress:
            source = source_of(stored, only=only or None, rename=_names_given(rename or []) or None)
            if quantise is not None:
                from weightsync.sources.quantised import quantised

                source = quantised(source, quantise)
            bar = progress.add_task("filling", total=source.nbytes)
            report: PushReport = push_source(
                source,
                version=version,
                model=model,
                daemon=daemon,
                pause=pause,
                timeout=timeout,
                on_progress=lambda done: progress.update(bar, completed=done, description=_stage(done, source.nbytes)),
            )
    except KeyboardInterrupt:
        typer.echo("weightsync: interrupted; the push is aborted, and `weightsync status` shows every engine", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    typer.echo(json.dumps(report.as_dict()) if as_json else str(report))
    raise typer.Exit(0 if report.complete else 1)


def _names_given(pairs: list[str]) -> dict[str, str]:
    """{OLD: NEW}."""
    names: dict[str, str] = {}
    for pair in pairs:
        old, equals, new = pair.partition("=")
        if not (old and equals and new) or old in names:
            why = "is the second for this tensor" if old in names else "is not OLD=NEW"
            raise typer.BadParameter(f"{pair!r} {why}", param_hint="--rename")
        names[old] = new
    return names


def _stage(done: int, total: int) -> str:
    return "filling" if done < total else "engines finish"


@app.command()
def status(
    daemon: DaemonOption = None,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every second until Ctrl-C.")] = False,
    as_json: JsonOption = False,
) -> None:
    """How a weightsyncd is: its engines and what they serve, its bridges, the push under way and the last one."""
    endpoint = daemon or default_endpoint()
    if as_json:
        typer.echo(json.dumps(_fetch(endpoint)))
        return
    from rich.console import Console

    console = Console(highlight=False)
    if not watch:
        console.print(_status_view(endpoint))
        return
    from rich.live import Live

    with (
        contextlib.suppress(KeyboardInterrupt),
        Live(_status_view(endpoint), console=console, refresh_per_second=4) as live,
    ):
        while True:
            select.select([], [], [], 1.0)
            live.update(_status_view(endpoint))


@engines_app.callback()
def engines(
    context: typer.Context,
    daemon: DaemonOption = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show which tensors replay, and why others do not.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Every engine a weightsyncd reaches: what it is, which protocol was chosen for it and why, what it serves. `add`
    and `remove` change which those of its own node are.
    """
    context.obj = daemon or default_endpoint()
    if context.invoked_subcommand is None and plan and not as_json:
        from rich.console import Console

        from weightsync.views import replay_details

        Console(highlight=False).print(replay_details(_fetch(context.obj)["engines"]))
    elif context.invoked_subcommand is None:
        _show_engines(_fetch(context.obj)["engines"], as_json=as_json)


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
    """Have the weightsyncd of this node push into one engine more, as soon as no push is under way.

    Until it is restarted, or told by SIGHUP to read its config again: add the engine there too.
    """
    from weightsync.config import EngineConfig
    from weightsync.operator import change_engines

    fields = {"name": name, "kind": kind, "url": url, "model": model, "path": path, "target": target}
    try:
        more = {"api_key_env": api_key_env, "ca_file": ca_file, "frozen": frozen}
        engine = msgspec.convert(fields | more, EngineConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"no such engine can be: {error}") from error
    found = change_engines(daemon or context.obj, add=[engine])
    _show_engines(msgspec.to_builtins(found), as_json=as_json)


@engines_app.command()
def remove(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="As in `weightsync engines`.", show_default=False)],
    daemon: DaemonOption = None,
) -> None:
    """Have the weightsyncd of this node leave an engine alone from now on, as soon as no push is under way.

    The engine is left as it is. Until weightsyncd is restarted, or told by SIGHUP to read its config again.
    """
    from weightsync.operator import change_engines

    change_engines(daemon or context.obj, remove=[name])
    typer.echo(f"{name} is no longer an engine of this node")


def _show_engines(found: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(found))
        return
    from rich.console import Console

    from weightsync.views import engine_details

    Console(highlight=False).print(engine_details(found))


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

    Run it where weightsyncd runs, as its user. Changes nothing.
    """
    from weightsync.config import EngineConfig, load_node_config
    from weightsync.doctor import examine, examine_node

    if (engine is None) == (node_config is None):
        raise ConfigError("say which engine: --engine URL, or --node-config FILE for all of a node's")
    found, titles = {}, {}
    if node_config is not None:
        config = load_node_config(node_config)
        here = f"node {config.node.name}"  # no engine is called so: their names have no spaces
        node, found[here] = examine_node(config)
        titles[here] = f"{here} of {node_config}"
        specs = config.engines
    else:
        node = None
        specs = (
            EngineConfig(
                name="engine", kind=kind, url=str(engine), path=path, api_key_env=api_key_env, ca_file=ca_file
            ),
        )
    for spec in specs:
        found[spec.name] = examine(spec, node, timeout=timeout)
        titles[spec.name] = f"{spec.name} at {spec.url}"
    if as_json:
        typer.echo(json.dumps(msgspec.to_builtins(found if node_config else found["engine"])))
    else:
        _show_findings(titles, msgspec.to_builtins(found))
    raise typer.Exit(1 if any(f.level == "fail" for findings in found.values() for f in findings) else 0)


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


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def bench(context: typer.Context) -> None:
    """How fast pushes are here, beside what this machine can do and what you would use instead.

    Only where weightsync runs from its source tree: the benchmarks are not in the installed package.
    """
    from importlib import import_module

    tree = Path(__file__).resolve().parent.parent
    if not all((tree / name).is_file() for name in ("pyproject.toml", "bench/cli.py")):
        raise ConfigError(
            f"the benchmarks are not in the installed package ({tree})",
            hint="in a clone of the source tree: `make setup`, then `.venv/bin/weightsync bench`, or `python -m bench`",
        )
    sys.path.insert(0, str(tree))  # for `bench` itself, which is no installed package
    import_module("bench.cli").app(args=context.args, prog_name=context.command_path)


def _show_findings(titles: dict[str, str], found: dict[str, list[dict[str, Any]]]) -> None:
    from rich.console import Console

    from weightsync.views import findings_view

    console = Console(highlight=False, markup=False)  # fixes have words in square brackets
    for name, findings in found.items():
        console.print(titles[name])
        console.print(findings_view(findings))


def _fetch(endpoint: str) -> dict[str, Any]:
    from weightsync.operator import fetch_status

    plain: dict[str, Any] = msgspec.to_builtins(fetch_status(endpoint))
    plain.pop("type", None)
    plain.pop("id", None)
    return plain


def _status_view(endpoint: str) -> Any:
    from weightsync.views import status_view

    return status_view(_fetch(endpoint), time.strftime("%H:%M:%S"))


def main() -> None:
    """Entry point of the console script: errors in words, exit status 1; 130 after Ctrl-C."""
    try:
        app()
    except WeightSyncError as error:
        typer.echo(f"weightsync: {error}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
