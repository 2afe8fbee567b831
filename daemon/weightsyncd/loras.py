"""Pushes of LoRA adapters: each node writes one as a directory, which its engines are told to read.

A LoRA adapter is megabytes: it goes through the daemon's socket, without slots, plan or session. Each version has its
own name (`policy@12`), so that no engine ever mixes two. The new version is loaded beside the old one, and the old one
is unloaded when the engine lists the new one. An engine that fails goes on with the old version. Engines are asked each
time what they have loaded. Beside the new directory, the newest older one of its name stays, and `keep` more: vLLM may
read it again for a request that goes on.
"""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import msgspec

from weightsync.endpoints import private_directory, runtime_dir
from weightsync.errors import (
    EngineError,
    EngineLost,
    EngineRefused,
    PushAborted,
    PushRefused,
    PushTimeout,
    WeightSyncError,
)
from weightsync.wire import messages as msg

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Mapping

    from weightsync.adapters.lora import LoraRoutes
    from weightsync.config import NodeConfig
    from weightsyncd.engines import Engine, Engines
    from weightsyncd.peers import Peer

__all__ = ["Loras", "older_versions"]

logger = logging.getLogger(__name__)

_NEW = ".new-"  # prefix of directories that are being written


class Loras:
    """Pushes of LoRA adapters to this node's engines and, for a trainer of this node, to those of its peers."""

    def __init__(
        self,
        config: NodeConfig,
        engines: Engines,
        peers: Mapping[str, Peer],
        busy: Callable[[], bool],
        spawn: Callable[[Coroutine[None, None, None]], None],
    ) -> None:
        """`busy` says whether a push of weights holds this node; `spawn` runs work in the background."""
        self._node, self._timeouts = config.node.name, config.timeouts
        self._engines, self._peers, self._busy, self._spawn = engines, peers, busy, spawn
        self._one = asyncio.Lock()
        self._freed = asyncio.Event()

    async def push(self, message: msg.PushLora) -> msg.LoraPushed:
        """Have every engine of the model load the LoRA adapter, after other pushes of this node have ended.

        Raises `PushRefused`, or `PushAborted` if the directory cannot be written, before any of this node's engines is
        touched. Raises `PushTimeout` if another push does not end.
        """
        until = time.monotonic() + message.timeout
        mine = [self._engines[name] for name in self._engines.of_model(message.model)]
        theirs = self._elsewhere(message) if message.forward else []
        if not mine and not theirs:
            raise _refused(message, f"no engine serves model {message.model!r}")
        await self._turn(message, until)
        try:
            held = await self._held(message, mine, until)
            try:
                path = await asyncio.to_thread(_write, self._node, message)
            except OSError as error:
                raise _refused(
                    message, f"the adapter cannot be written to {error.filename}: {error.strerror}"
                ) from error
            outcomes = await asyncio.gather(
                *(self._load(engine, held[engine.name], message, path, until) for engine in mine),
                *(self._pass_on(peer, statuses, message, until) for peer, statuses in theirs),
            )
        finally:
            self._one.release()
        return msg.LoraPushed(engines=tuple(outcome for some in outcomes for outcome in some))

    async def _turn(self, message: msg.PushLora, until: float) -> None:
        """Take `_one` when the node is free. A push of weights ends for the trainer before it ends for the node."""
        busy = "an earlier LoRA adapter"
        try:
            async with asyncio.timeout_at(until):
                await self._one.acquire()
                busy = "a push of weights"
                try:
                    while self._busy():
                        await self._freed.wait()
                except BaseException:
                    self._one.release()
                    raise
        except TimeoutError as error:
            raise PushTimeout(
                f"{busy} is still under way on node {self._node}", model=message.model, version=message.version
            ) from error

    def go_on(self) -> None:
        """Wake pushes that wait here: the node may be free."""
        self._freed.set()
        self._freed.clear()

    def _elsewhere(self, message: msg.PushLora) -> list[tuple[Peer, list[msg.EngineStatus]]]:
        """Return the peers with engines that take the model, and these engines."""
        found = [
            (peer, [e for e in peer.engines if e.model == message.model and not e.frozen])
            for peer in self._peers.values()
        ]
        return [(peer, engines) for peer, engines in found if engines]

    async def _held(
        self, message: msg.PushLora, engines: Iterable[Engine], until: float
    ) -> dict[str, list[str] | WeightSyncError]:
        """Return, by engine, the LoRA adapters that it has loaded, or why it does not say. Raises `PushRefused`."""
        soon = min(until, time.monotonic() + self._timeouts.probe)

        async def ask(engine: Engine) -> tuple[str, list[str] | WeightSyncError]:
            try:
                return engine.name, await _routes(engine).names(deadline=soon)
            except EngineRefused as error:
                raise _refused(message, error.message, hint=error.hint) from error
            except WeightSyncError as error:
                return engine.name, error

        held = dict(await asyncio.gather(*map(ask, engines)))
        for name, names in held.items():
            newest = max((v for v, _ in _versions(message.name, names)), default=-1) if isinstance(names, list) else -1
            if newest >= message.version:
                raise _refused(
                    message,
                    f"engine {name} has {message.name}@{newest} loaded already",
                    hint="versions of an adapter must rise",
                )
        return held

    async def _load(
        self, engine: Engine, held: list[str] | WeightSyncError, message: msg.PushLora, path: Path, until: float
    ) -> list[msg.LoraOutcome]:
        served = path.name
        try:
            if isinstance(held, WeightSyncError):
                raise held
            async with asyncio.timeout_at(until), engine.lock:
                if self._busy():
                    raise EngineError("a push of weights began meanwhile", engine=engine.name)
                await _routes(engine).load(served, str(path), deadline=until)
        except TimeoutError:
            error: WeightSyncError = EngineLost(
                f"engine {engine.name} was not free before the deadline", engine=engine.name
            )
        except WeightSyncError as failure:
            error = failure
        else:
            logger.info("[engine=%s] LoRA adapter %s is loaded", engine.name, served)
            if old := older_versions(message.name, message.version, message.keep, held):
                self._spawn(self._unload(engine, old))
            return [msg.LoraOutcome(engine=engine.name, node=self._node, outcome="loaded")]
        logger.warning("[engine=%s] LoRA adapter %s failed: %s", engine.name, served, error.message)
        how = "lost" if isinstance(error, EngineLost) else "failed"
        return [msg.LoraOutcome(engine=engine.name, node=self._node, outcome=how, error=error.record())]

    async def _unload(self, engine: Engine, names: Iterable[str]) -> None:
        """Unload old versions; runs in the background, since SGLang lets requests under way end first.

        If that fails, the next push unloads them.
        """
        for name in names:
            try:
                await _routes(engine).unload(name, deadline=time.monotonic() + self._timeouts.operation)
            except WeightSyncError as error:
                logger.warning("[engine=%s] LoRA adapter %s is still loaded: %s", engine.name, name, error.message)

    async def _pass_on(
        self, peer: Peer, engines: Iterable[msg.EngineStatus], message: msg.PushLora, until: float
    ) -> list[msg.LoraOutcome]:
        question = msgspec.structs.replace(message, forward=False, timeout=max(0.0, until - time.monotonic()))
        try:
            # the far side keeps the same deadline; its answer needs a moment more
            answer = await peer.ask(question, until + self._timeouts.liveness)
            if isinstance(answer, msg.LoraPushed):
                return list(answer.engines)
            raise EngineError(f"node {peer.name} answered PushLora with {type(answer).__name__}")
        except WeightSyncError as error:
            record = error.record()
        return [msg.LoraOutcome(engine=e.name, node=peer.name, outcome="failed", error=record) for e in engines]


def older_versions(name: str, version: int, keep: int, held: Iterable[str]) -> list[str]:
    """Return those of an engine's LoRA adapters that are versions of `name` before `version`, but the newest `keep`."""
    older = sorted((v, one) for v, one in _versions(name, held) if v < version)
    return [one for _, one in older[: len(older) - keep]] if keep < len(older) else []


def _versions(name: str, held: Iterable[str]) -> list[tuple[int, str]]:
    """Return the versions of `name` among `held`, each with its full name."""
    pattern = re.compile(rf"{re.escape(name)}@(\d{{1,19}})")
    return [(int(found[1]), one) for one in held if (found := pattern.fullmatch(one))]


def _routes(engine: Engine) -> LoraRoutes:
    routes = engine.adapter.loras
    if routes is None:
        raise EngineRefused(
            f"engine {engine.name} is of kind {engine.config.kind}, which takes no LoRA adapters",
            engine=engine.name,
            hint="push it merged",
        )
    return routes


def _refused(message: msg.PushLora, reason: str, hint: str | None = None) -> PushRefused:
    return PushRefused(reason, model=message.model, version=message.version, hint=hint)


def _write(node: str, message: msg.PushLora) -> Path:
    """Write the LoRA adapter as peft saves it, in a private directory. Of older versions the last `keep` + 1 stay."""
    folder = private_directory(runtime_dir()) / f"{node}.loras" / quote(message.model, safe="")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    there = sorted((v, one) for v, one in _versions(message.name, [p.name for p in folder.iterdir()]))
    older = [one for v, one in there if v < message.version]
    left = [one for v, one in there if v >= message.version]  # of an earlier run: engines that answer have none of them
    for one in (*older[: -1 - message.keep], *left, *(p.name for p in folder.glob(f"{_NEW}*"))):
        shutil.rmtree(folder / one, ignore_errors=True)
    path = folder / f"{message.name}@{message.version}"
    new = Path(tempfile.mkdtemp(dir=folder, prefix=_NEW))
    try:
        (new / "adapter_config.json").write_bytes(message.config)
        (new / "adapter_model.safetensors").write_bytes(message.weights)
        return new.rename(path)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise PushAborted(
            f"node {node} cannot write the adapter to {folder}: {error.strerror}",
            model=message.model,
            version=message.version,
        ) from error
