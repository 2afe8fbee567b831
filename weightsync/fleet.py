"""A small fleet on this machine: daemons, reference engines and trainer ranks as child processes of this one.

The demo, the benchmarks and the end-to-end tests all run on it, and so can you. The processes are those of production,
in a private directory, and nothing of them is left when the `with` block ends.

    with Fleet() as fleet:
        engine = fleet.start_engine("e0", checkpoint, tp=2)
        daemon = fleet.start_daemon("node0", [engine])
        push_weights(model, version=1, daemon=daemon.endpoint)
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from weightsync.errors import WeightSyncError
from weightsync.operator import fetch_status

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Child", "Daemon", "Engine", "Fleet", "FleetError"]

_START = 60.0  # seconds; importing torch on a loaded laptop takes several
_STOP = 10.0
_LOOK = 0.02  # seconds between looks at whether a child is ready


class FleetError(WeightSyncError):
    """A child process failed. The message ends with the end of its log."""


@dataclass
class Child:
    """One child process and its log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    within: tuple[str, ...] = field(default=(), kw_only=True)  # a command to run it in, such as `ip netns exec a`
    env: Mapping[str, str] = field(default_factory=dict, kw_only=True)  # in addition to the fleet's

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal. After SIGKILL, wait until the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.wait(_STOP)

    def wait(self, timeout: float) -> int:
        """Wait for the process and return its exit status. Raises `FleetError` if it takes longer than `timeout`."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise FleetError(f"{self.name} has not ended within {timeout:g} s\n{self.tail()}") from error

    def tail(self, lines: int = 20) -> str:
        """Return the end of the log, each line with the child's name."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(f"  {self.name}| {line}" for line in text.splitlines()[-lines:])


@dataclass
class Engine(Child):
    """A reference engine. Its process leads a process group, which includes its workers."""

    url: str = ""
    tp: int = 1
    model: str = "default"
    device: str = "cpu"
    arguments: tuple[str, ...] = ()


@dataclass
class Daemon(Child):
    """A weightsyncd."""

    endpoint: str = ""
    listen: str = ""  # the endpoint at which other nodes reach it, if not `endpoint`
    config: Path = field(default_factory=Path)


class Fleet:
    """All children of one run. Use it as a context manager."""

    def __init__(self, root: str | Path | None = None) -> None:
        self._own_root = root is None
        # a short prefix, because a socket's path has at most 107 characters
        self.root = Path(root) if root is not None else Path(tempfile.mkdtemp(prefix="ws-"))
        self.root.mkdir(parents=True, exist_ok=True)
        self.children: list[Child] = []
        self.env = {
            **os.environ,
            "XDG_RUNTIME_DIR": str(self.root),
            "OMP_NUM_THREADS": "1",  # a fleet on one machine shares its cores
            "PYTHONUNBUFFERED": "1",
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- starting -------------------------------------------------------------------------------------------------

    def spawn(self, name: str, arguments: Sequence[str], *, env: Mapping[str, str] | None = None) -> Child:
        """Start `python arguments…`; its output goes to a log."""
        log = self.root / f"{name}.log"
        child = Child(name, self._popen(arguments, log, env), log)
        self.children.append(child)
        return child

    def _popen(
        self, arguments: Sequence[str], log: Path, env: Mapping[str, str] | None = None, within: Sequence[str] = ()
    ) -> subprocess.Popen[bytes]:
        with log.open("ab") as out:
            return subprocess.Popen(
                [*within, sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**self.env, **(env or {})},
                start_new_session=True,
            )

    def start_engine(
        self,
        name: str,
        checkpoint: str | Path,
        *,
        tp: int = 1,
        model: str = "default",
        device: str = "cpu",
        port: int = 0,
        flags: Sequence[str] = (),
        wait: bool = True,
        env: Mapping[str, str] | None = None,
        within: Sequence[str] = (),
    ) -> Engine:
        """Start a reference engine on the checkpoint. With `wait=False`, call `wait_engine` before using its url."""
        port_file = self.root / f"{name}.port"
        port_file.unlink(missing_ok=True)
        arguments = (
            *("-m", "weightsync.adapters.reference", "--model", str(checkpoint), "--tp", str(tp), "--name", name),
            *("--device", device, "--port", str(port), "--port-file", str(port_file), *flags),
        )
        log = self.root / f"{name}.log"
        process = self._popen(arguments, log, env, within)
        engine = Engine(
            name,
            process,
            log,
            tp=tp,
            model=model,
            device=device,
            arguments=arguments,
            within=tuple(within),
            env=dict(env or {}),
        )
        self.children.append(engine)
        if wait:
            self.wait_engine(engine)
        return engine

    def wait_engine(self, engine: Engine) -> None:
        """Return when the engine answers."""
        port_file = self.root / f"{engine.name}.port"
        self._until(engine, port_file.exists)
        engine.url = f"http://127.0.0.1:{int(port_file.read_text().strip())}"

    def restart_engine(self, engine: Engine) -> Engine:
        """Restart an engine that has ended, with the same arguments and at the same address."""
        port = engine.url.rpartition(":")[2]
        arguments = list(engine.arguments)
        arguments[arguments.index("--port") + 1] = port
        port_file = self.root / f"{engine.name}.port"
        port_file.unlink(missing_ok=True)
        engine.process = self._popen(arguments, engine.log, engine.env, engine.within)
        self.wait_engine(engine)
        return engine

    def start_daemon(
        self,
        node: str,
        /,  # so that `sections` may have a key of this name
        engines: Sequence[Engine] = (),
        *,
        peers: Sequence[Daemon] | Mapping[str, str] = (),
        wait: bool = True,
        within: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        **sections: Mapping[str, Any],
    ) -> Daemon:
        """Start a weightsyncd. `peers` are daemons, or endpoints by node name.

        `sections` are tables of the node config: `arena={"slots": 2}`, `timeouts={…}`.
        """
        tables: dict[str, dict[str, Any]] = {name: dict(table) for name, table in sections.items()}
        endpoint = f"ipc://{self.root / node}.sock"
        tables["node"] = {"name": node, "listen": endpoint, **tables.get("node", {})}
        on_gpus = any(engine.device == "cuda" for engine in engines)
        tables["arena"] = {"device": "cuda" if on_gpus else "cpu", **tables.get("arena", {})}
        lines = [line for name, table in tables.items() for line in _toml(name, table)]
        if not isinstance(peers, Mapping):
            peers = {peer.name: peer.listen or peer.endpoint for peer in peers}
        lines += _toml("cluster.peers", peers) if peers else []
        for engine in engines:
            lines += ["[[engines]]", f'name = "{engine.name}"', 'kind = "reference"', f'url = "{engine.url}"']
            lines += [f'model = "{engine.model}"']
        config = self.root / f"{node}.toml"
        config.write_text("\n".join(lines) + "\n")
        log = self.root / f"{node}.log"
        process = self._popen(("-m", "weightsyncd", "--node-config", str(config)), log, env, within)
        listen = str(tables.get("cluster", {}).get("listen", ""))
        more: dict[str, Any] = {"within": tuple(within), "env": dict(env or {})}
        daemon = Daemon(node, process, log, endpoint=endpoint, listen=listen, config=config, **more)
        self.children.append(daemon)
        if wait:
            self.wait_daemon(daemon, engines=len(engines), peers=len(peers))
        return daemon

    def restart_daemon(self, daemon: Daemon) -> Daemon:
        """Restart a daemon that has ended, with the same config."""
        arguments = ("-m", "weightsyncd", "--node-config", str(daemon.config))
        daemon.process = self._popen(arguments, daemon.log, daemon.env, daemon.within)
        self.wait_daemon(daemon)
        return daemon

    def wait_daemon(self, daemon: Daemon, *, engines: int = 0, peers: int = 0) -> None:
        """Return when the daemon answers, has looked at its engines and is attached to its peers."""

        def ready() -> bool:
            try:
                status = fetch_status(daemon.endpoint, timeout=1.0)
            except WeightSyncError:
                return False
            seen = sum(e.node == daemon.name and e.state not in ("unknown", "lost") for e in status.engines)
            return seen >= engines and sum(state == "connected" for state in status.peers.values()) >= peers

        self._until(daemon, ready)

    def torchrun(
        self,
        name: str,
        script: str | Path,
        ranks: int,
        arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> Child:
        """Start `ranks` trainer ranks with torchrun."""
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
        return self.spawn(name, (*launcher, str(script), *arguments), env=env)

    def _until(self, child: Child, ready: Any) -> None:
        deadline = time.monotonic() + _START
        while not ready():
            if child.process.poll() is not None:
                raise FleetError(f"{child.name} ended with status {child.process.returncode}\n{child.tail()}")
            if time.monotonic() > deadline:
                raise FleetError(f"{child.name} was not ready within {_START:g} s\n{child.tail()}")
            select.select([], [], [], _LOOK)

    # --- stopping -------------------------------------------------------------------------------------------------

    def end(self, child: Child) -> None:
        """End one child: SIGTERM, and SIGKILL for its whole process group if it has not ended after some seconds."""
        if child.process.poll() is None:
            child.kill(signal.SIGTERM)
        try:
            child.wait(_STOP)
        except FleetError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait(_STOP)

    def stop(self) -> None:
        """End every child, the youngest first, and remove the directory."""
        for child in reversed(self.children):
            if child.process.poll() is None:
                child.kill(signal.SIGTERM)
        for child in reversed(self.children):
            self.end(child)
        self.children.clear()
        if self._own_root:
            shutil.rmtree(self.root, ignore_errors=True)


def _toml(name: str, table: Mapping[str, Any]) -> list[str]:
    def text(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(text, value))}]"
        return str(value) if isinstance(value, int | float) else f'"{value}"'

    return [f"[{name}]", *(f"{key} = {text(value)}" for key, value in table.items())]
