"""`weightsyncd --node-config node.toml`"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from pathlib import Path  # noqa: TC003 - typer reads the annotation
from typing import Annotated

import typer

from weightsync import logs
from weightsync.config import NodeConfig, load_node_config
from weightsync.errors import ConfigError, WeightSyncError
from weightsync.placement import placed
from weightsyncd.server import Server

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

_STOPS = (signal.SIGTERM, signal.SIGINT)


def _set_up_logging(config: NodeConfig) -> None:
    logs.set_up(config.log.level, config.log.format)


async def serve(path: Path, changes: list[str], config: NodeConfig) -> None:
    """Run the daemon with `config` until SIGTERM or SIGINT. On SIGHUP, read the file at `path` again."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    server = Server(placed(config))
    for number in _STOPS:
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(
        signal.SIGHUP, lambda: server.changes.reload(lambda: load_node_config(path, changes), config)
    )
    try:
        await server.run(stop)
    finally:  # all is shut down: a signal that comes now must not make the exit look like a failure
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)


@app.command()
def weightsyncd(
    node_config: Annotated[
        Path,
        typer.Option("--node-config", help="TOML file; docs/configuration.md shows every key.", show_default=False),
    ],
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="SECTION.KEY=VALUE, instead of what the file says: node.name=node7. May be repeated."
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Check the config, say what is wrong, and exit.")] = False,
) -> None:
    """Run weightsync's service on this node.

    It takes weights from the trainer ranks of this node over a private socket and hands them to the engines that the
    node config lists. SIGTERM or Ctrl-C stops it: a push under way may end first, and nothing is left behind. After
    SIGHUP it has the engines and peers that the config lists then.
    """
    try:
        config = load_node_config(node_config, changes or [])
        if check:
            typer.echo(f"{node_config}: good; node {config.node.name} would listen at {config.endpoint}")
            return
        _set_up_logging(config)
        asyncio.run(serve(node_config, changes or [], config))
    except ConfigError as error:
        typer.echo(f"weightsyncd: {error}", err=True)
        sys.exit(2)
    except WeightSyncError as error:
        typer.echo(f"weightsyncd: {error}", err=True)
        sys.exit(1)


def main() -> None:
    """Entry point of the console script."""
    with contextlib.suppress(KeyboardInterrupt):
        app()


if __name__ == "__main__":
    main()
