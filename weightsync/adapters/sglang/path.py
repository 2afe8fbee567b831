"""What every way of loading a bucket into SGLang has in common, and what they share: sessions and first refusals."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar

from weightsync.adapters.base import LoadsBuckets
from weightsync.adapters.http import EngineAnswer
from weightsync.adapters.sglang.profiles import numbers_of
from weightsync.errors import EngineError, EngineRefused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.adapters.sglang.profiles import Profile
    from weightsync.adapters.sglang.server import Server, ServerFacts
    from weightsync.plan.manifest import Manifest
    from weightsync.plan.replay_facts import ReplayFacts

__all__ = ["SELECTORS", "EnginePath", "Session", "refuse_server"]

SELECTORS = {"all": "all", "model": "target", "draft": "draft"}
"""`target` of an engine's configuration → SGLang's word for it."""


_REQUANTISES = (0, 5, 22)  # the first SGLang whose flash_rl loader shards, then quantises


class EnginePath(LoadsBuckets):
    """One way into a server. An instance lives as long as the server does; updates follow one another. After a `load`
    that fails nothing is left open that would hinder the next `begin`.
    """

    name: ClassVar[str]
    transport: str  # whose tickets it takes
    replay: ReplayFacts | None = None  # what its workers said of the last push, where they have our plugin

    @abstractmethod
    async def accept(self, manifest: Manifest, *, deadline: float) -> tuple[str, ...] | None:
        """Refuse what cannot be loaded; the names that would be left as they are, as far as the server tells."""

    @abstractmethod
    async def begin(self, manifest: Manifest, offers: Sequence[Sequence[bytes]], *, deadline: float) -> None:
        """Open an update. One that an earlier push left open is ended first."""

    @abstractmethod
    async def finish(self, *, deadline: float) -> None:
        """Everything is loaded. Caches are flushed elsewhere."""

    async def close(self) -> None:
        """Let go of what this side holds; an update that is open has been given up."""


class Session:
    """SGLang's weight-update session (0.5.21): packed weights are restored when it opens, packed again when it ends.

    Servers before have none, and nothing happens.
    """

    def __init__(self, server: Server, profile: Profile, target: str) -> None:
        self._server = server
        self._needed = profile.sessions
        self._selector = SELECTORS[target]

    async def open(self, *, deadline: float) -> None:
        """Open one; an open one, left by a push that failed, is ended first."""
        if not self._needed:
            return
        body = {"selector": self._selector}
        try:
            await self._server.call("/begin_weight_update", body, deadline=deadline)
        except EngineAnswer as answer:
            if "already open" not in answer.reason:
                raise
            await self.end(deadline=deadline)
            await self._server.call("/begin_weight_update", body, deadline=deadline)

    async def end(self, *, deadline: float) -> None:
        """End the open one."""
        if self._needed:
            await self._server.call("/end_weight_update", {}, deadline=deadline)

    async def abandon(self, *, deadline: float) -> None:
        """End the open one after a failure, whose error is the one to tell: there is no way to abort."""
        with suppress(EngineError):
            await self.end(deadline=deadline)


def refuse_server(facts: ServerFacts, profile: Profile, target: str, engine: str, *, plugin: bool) -> None:
    """Raise `EngineRefused`, with the reason, for a server that cannot take weights, by our `plugin` or otherwise."""
    problem = hint = None
    if facts.dp_size != 1:
        problem, hint = f"it runs with dp_size {facts.dp_size}", "one server for each replica (dp attention is fine)"
    elif facts.pp_size != 1:
        problem, hint = f"it runs with pp_size {facts.pp_size}", "tensor parallelism only: --pp-size 1"
    elif facts.weight_cache_mode != "off":
        problem = f"it shares its weights with others (--weight-cache-mode {facts.weight_cache_mode})"
        hint = "--weight-cache-mode off"
    elif facts.enable_lora:  # run on 0.5.23: it passes over what it does not find, and ends torn
        problem = "it serves LoRA adapters (--enable-lora), and its layers have other names then"
        hint = "push_lora for the adapter alone, or a server without --enable-lora for merged weights"
    elif facts.quantization and not _reloads(facts, profile, plugin=plugin):
        problem = (
            f"it quantises to {facts.quantization!r}, and SGLang {facts.version} "
            f"(--load-format {facts.load_format or 'auto'}) cannot load new weights over quantised ones"
        )
        hint = "fp8: our plugin, or from SGLang 0.5.22 on --load-format flash_rl; else no quantisation"
    elif facts.tokenizer_worker_num != 1:
        problem = f"each of its {facts.tokenizer_worker_num} tokenizer workers has a version and pauses of its own"
        hint = "--tokenizer-worker-num 1"
    elif target == "draft" and not facts.speculative_algorithm:
        problem, hint = "it has no draft model", 'target = "all"'
    elif target == "draft" and profile.draft != "selector":
        problem, hint = f"SGLang {facts.version} cannot load into the draft model alone", 'target = "all" or "model"'
    elif target == "model" and profile.draft == "none" and facts.speculative_algorithm:
        problem, hint = f"SGLang {facts.version} cannot leave out the draft model", 'target = "all"'
    if problem:
        raise EngineRefused(f"SGLang cannot take weights: {problem}", engine=engine, phase="accept", hint=hint)


def _reloads(facts: ServerFacts, profile: Profile, *, plugin: bool) -> bool:
    """Whether weights may be loaded again into a quantised model.

    Run on 0.5.17: fp8 over fp8 ends the server, and so does its `flash_rl` loader for models that normalise queries.
    From 0.5.22 on (its source) that loader quantises anew what it is given. A session unpacks what few methods pack in
    place (`restore_weights_before_loading` in srt/layers/quantization, to 0.5.23), fp8 not among them.
    """
    if facts.quantization == "fp8":
        if plugin and facts.plugin is not None and facts.plugin.requantises:
            return True
        numbers = numbers_of(facts.version)
        return facts.load_format == "flash_rl" and (numbers is None or numbers >= _REQUANTISES)
    return profile.sessions and facts.quantization == "compressed-tensors"
