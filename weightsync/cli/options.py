"""The one app, and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="New policy weights into every inference engine. `demo` shows it all on this machine; `push` sends a "
    "checkpoint directory; `status`, `trace` and `engines` look at a running weightsyncd; `doctor` says what a node "
    "or an engine lacks; `bench` measures.",
)

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
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
