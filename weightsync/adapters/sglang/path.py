"""The common part of all paths into SGLang: the base class, weight-update sessions, and refusals of whole servers."""

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
    """One path into a server. An instance lives as long as the server; updates follow one another.

    After a failed `load`, nothing is left open that would hinder the next `begin`.
    """

    name: ClassVar[str]
    transport: str  # the transport whose tickets it takes
    replay: ReplayFacts | None = None  # what our plugin, if it is there, said of the last push

    @abstractmethod
    async def accept(self, manifest: Manifest, *, deadline: float) -> tuple[str, ...] | None:
        """Refuse tensors that cannot be loaded. Returns the names that the push leaves alone; None: it cannot tell."""

    @abstractmethod
    async def begin(self, manifest: Manifest, offers: Sequence[Sequence[bytes]], *, deadline: float) -> None:
        """Open an update, ending one that an earlier push left open."""

    @abstractmethod
    async def finish(self, *, deadline: float) -> None:
        """End an update that is loaded whole. The adapter flushes caches."""

    async def close(self) -> None:
        """Abandon an open update, and free what this side holds."""


class Session:
    """SGLang's weight-update session (0.5.21): packed weights are restored when it opens, packed again when it ends.

    For earlier servers, which have no sessions, all methods do nothing.
    """

    def __init__(self, server: Server, profile: Profile, target: str) -> None:
        self._server = server
        self._needed = profile.sessions
        self._selector = SELECTORS[target]

    async def open(self, *, deadline: float) -> None:
        """Open a session, ending one that a failed push left open."""
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
        """End the open session."""
        if self._needed:
            await self._server.call("/end_weight_update", {}, deadline=deadline)

    async def abandon(self, *, deadline: float) -> None:
        """End the open session after a failure, and swallow errors: the first failure is the one to report.

        SGLang has no way to abort a session.
        """
        with suppress(EngineError):
            await self.end(deadline=deadline)


def refuse_server(facts: ServerFacts, profile: Profile, target: str, engine: str, *, plugin: bool) -> None:
    """Raise `EngineRefused`, with the reason, if the server cannot take weights. `plugin`: our plugin is the path."""
    problem = hint = None
    if facts.dp_size != 1:
        problem, hint = f"it runs with dp_size {facts.dp_size}", "one server for each replica (dp attention is fine)"
    elif facts.pp_size != 1:
        problem, hint = f"it runs with pp_size {facts.pp_size}", "tensor parallelism only: --pp-size 1"
    elif facts.weight_cache_mode != "off":
        problem = f"it shares its weights with others (--weight-cache-mode {facts.weight_cache_mode})"
        hint = "--weight-cache-mode off"
    elif facts.enable_lora:  # run on 0.5.23: it skips the names that it does not find, and ends torn
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
    """Whether new weights may be loaded into a quantised model.

    Run on 0.5.17: loading over fp8 weights ends the server, and so does its `flash_rl` loader for models that normalise
    queries. From 0.5.22 on (its source) that loader quantises new weights again. A session unpacks the weights of a few
    quantisation methods only (`restore_weights_before_loading` in srt/layers/quantization, to 0.5.23); fp8 is not one
    of them.
    """
    if facts.quantization == "fp8":
        if plugin and facts.plugin is not None and facts.plugin.requantises:
            return True
        numbers = numbers_of(facts.version)
        return facts.load_format == "flash_rl" and (numbers is None or numbers >= _REQUANTISES)
    return profile.sessions and facts.quantization == "compressed-tensors"
