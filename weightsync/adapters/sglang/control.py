"""The adapter of one SGLang server, in the daemon.

The server's own weight version marks a torn engine: it is "16>17" from the first byte on, and "17" once everything is
loaded, the cache is flushed and the comparison, if there is one, has succeeded. The dialect and the path are chosen at
the first probe, and again after a restart. A push probes twice, so later probes ask a server that has our plugin only
for state that changes while it runs. SGLang before 0.5.20 does not say whether it is paused, so the adapter remembers
that it paused the server; it does not notice if somebody else resumes it.
"""

from __future__ import annotations

import asyncio
from base64 import b64encode
from typing import TYPE_CHECKING, NamedTuple

from weightsync.adapters.base import EngineInfo
from weightsync.adapters.checkpoint import CheckpointCheck
from weightsync.adapters.http import EngineAnswer, EngineHttp, at_once
from weightsync.adapters.lora import LoraRoutes
from weightsync.adapters.readers import reader_gpus
from weightsync.adapters.replaying import ReplayingAdapter
from weightsync.adapters.sglang import orders
from weightsync.adapters.sglang.doctor import examine
from weightsync.adapters.sglang.path import refuse_server
from weightsync.adapters.sglang.path_group import GroupPath
from weightsync.adapters.sglang.path_plugin import PluginPath
from weightsync.adapters.sglang.path_tensor import TensorPath
from weightsync.adapters.sglang.profiles import choose
from weightsync.adapters.sglang.server import Server
from weightsync.adapters.versions import check_marked, read, serving, updating
from weightsync.errors import PLUGIN_HINT, EngineError, EngineRefused, LocalProtocolError
from weightsync.pickling import dumps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.adapters import EngineSpec
    from weightsync.adapters.base import Finding, PauseMode
    from weightsync.adapters.connection import HttpClient
    from weightsync.adapters.sglang.path import EnginePath
    from weightsync.adapters.sglang.profiles import Profile
    from weightsync.adapters.sglang.server import PluginState, ServerFacts
    from weightsync.plan.manifest import Manifest

__all__ = ["SGLangAdapter"]


class _Known(NamedTuple):
    """The facts that do not change while one incarnation of the server runs."""

    incarnation: str
    facts: ServerFacts
    profile: Profile
    why: str
    says_ready: bool
    path: EnginePath
    checkpoint: CheckpointCheck


class _State(NamedTuple):
    """The state that changes while the server runs."""

    plugin: PluginState | None
    weight_version: object
    paused: bool | None  # None: the server does not say


class SGLangAdapter(ReplayingAdapter):
    """One SGLang HTTP server."""

    def __init__(self, spec: EngineSpec, *, client: HttpClient | None = None) -> None:
        """Does not connect yet. `client` replaces the network in tests."""
        super().__init__(spec.name)
        self._way, self._target = spec.path, spec.target
        self._named_gpus = spec.gpus
        self._keyed = spec.api_key is not None
        self._http = EngineHttp(spec, client=client)
        self.loras = LoraRoutes(self._http, "", "with --enable-lora")
        self._server = Server(self._http)
        self._known: _Known | None = None
        self._mode: PauseMode | None = None  # the mode in which we paused it
        self._asleep: tuple[str, ...] = ()
        self._version: int | None = None
        self._loaded: int | None = None  # a version that is loaded but not served yet
        self._begun = False  # an update has begun since the last resume
        self._incomplete = ""  # why only the whole model can be loaded

    def __repr__(self) -> str:
        return f"SGLangAdapter({self.name!r}, {self._http.url!r})"

    async def probe(self, *, deadline: float) -> EngineInfo:
        """See the base class. Ends an update that is still open first.

        No push is in its loading phase during a probe, so an open update was abandoned; the server may be waiting in it
        without answering anything else.
        """
        if self._known is not None:
            await self._known.path.close()
        elif self._way == "ipc":
            from weightsync.adapters.sglang.path_ipc import end_abandoned

            await end_abandoned(self._http.url, deadline=deadline)
        known, state = await self._again(deadline) or await self._anew(deadline)
        plugin, weights = state.plugin, read(state.weight_version)
        self._version = weights.version
        self._asleep = plugin.asleep if plugin else ()
        known.path.replay = plugin.replay if plugin else None
        released = "its weights are released" if "weights" in self._asleep else ""
        self._incomplete = "it is torn" if weights.torn else released
        paused = state.paused
        if paused is None:
            paused = self._mode is not None or (plugin is not None and plugin.paused)
        return EngineInfo(
            software=f"sglang {known.facts.version}",
            profile=known.why,
            tp_size=known.facts.tp_size,
            version=weights.version,
            paused=paused,
            torn=weights.torn,
            transport=known.path.transport,
            incarnation=known.incarnation,
            asleep="weights" in self._asleep,
            replay=known.path.replay,
        )

    async def accept(self, manifest: Manifest, *, deadline: float) -> tuple[str, ...] | None:
        """See the base class. Only the plugin knows which names a model takes and which ones a push leaves alone."""
        known = self._probed()
        plugin = isinstance(known.path, PluginPath)
        refuse_server(known.facts, known.profile, self._target, self.name, plugin=plugin)
        quantised = plugin and known.facts.quantization is not None  # a layer is quantised as a whole
        whole = "it quantises" if quantised else self._incomplete
        await known.checkpoint.refuse(manifest, whole=whole, sure=quantised)
        untouched = await known.path.accept(manifest, deadline=deadline)
        if self._incomplete and untouched:
            raise EngineRefused(
                f"{self._incomplete}, so only a whole model can be loaded, without {', '.join(untouched[:5])}",
                engine=self.name,
                phase="accept",
            )
        return untouched

    async def pause(self, mode: PauseMode, *, deadline: float) -> None:
        """See the base class.

        "keep" retracts requests: they return to the queue, lose their cached keys and values, and continue on the new
        weights. SGLang 0.5.12 to 0.5.20 cannot flush its cache while requests are queued, so there "keep" acts as
        "wait". "wait" lets running requests end. The few that begin between their end and the pause are retracted, or,
        on those versions, aborted. "none" freezes requests where they are; they keep their old keys and values.
        """
        known = self._probed()
        self._loaded = None  # a version that an earlier push loaded is not served any more
        queued = known.profile.flushes_queued
        if self._mode is None and (mode == "wait" or (mode == "keep" and not queued)):
            await self._drain(known, deadline)
        word = "abort" if mode == "abort" else "in_place" if mode == "none" else "retract" if queued else "abort"
        await self._server.call("/pause_generation", {"mode": word}, deadline=deadline)
        self._mode = mode

    async def begin(
        self, version: int, manifest: Manifest, offers: Sequence[Sequence[bytes]], *, deadline: float
    ) -> None:
        known = self._probed()
        self._loaded = None
        await self._server.set_weight_version(updating(self._version, version), deadline=deadline)
        self._begun = True
        if "weights" in self._asleep:
            await self._wake(("weights",), deadline)
        pull, anew = self._unchecked(manifest)
        if (path := self._replaying()) is not None:
            await path.begin(manifest, offers, pull=pull, anew=anew, deadline=deadline)
        else:
            await known.path.begin(manifest, offers, deadline=deadline)

    async def load(self, bucket: int, tickets: Sequence[bytes], *, deadline: float) -> None:
        await self._probed().path.load(bucket, tickets, deadline=deadline)

    async def load_several(self, first: int, tickets: Sequence[Sequence[bytes]], *, deadline: float) -> None:
        await self._probed().path.load_several(first, tickets, deadline=deadline)

    async def finish(self, version: int, *, deadline: float) -> None:
        known = self._probed()
        await known.path.finish(deadline=deadline)
        await self._flush(known.facts, deadline)
        self._loaded = version

    async def resume(self, *, deadline: float) -> None:
        """See the base class. Sets the version only now: a loaded engine counts as torn until it is verified."""
        if self._loaded is not None:
            await self._serve(self._loaded, deadline)
        if self._asleep and self._begun:  # an engine that this push did not touch stays asleep, as its operator left it
            await self._wake(self._asleep, deadline)
        self._begun = False
        await self._server.call("/continue_generation", {}, deadline=deadline)
        self._mode = None

    async def examine(self, *, deadline: float) -> Sequence[Finding]:
        await self.probe(deadline=deadline)
        known = self._probed()
        return await examine(
            self._server,
            known.facts,
            known.profile,
            known.why,
            target=self._target,
            keyed=self._keyed,
            plugin=isinstance(known.path, PluginPath),
            deadline=deadline,
        )

    async def close(self) -> None:
        if self._known is not None:
            await self._known.path.close()
        await self._http.close()

    def _replaying(self) -> PluginPath | None:
        path = self._known.path if self._known is not None else None
        return path if isinstance(path, PluginPath) else None

    def _probed(self) -> _Known:
        if self._known is None:
            raise LocalProtocolError(f"engine {self.name!r} was not probed", engine=self.name)
        return self._known

    async def _again(self, deadline: float) -> tuple[_Known, _State] | None:
        """Ask a known server for its state, in short answers.

        Returns None if only `_anew` can tell: the server has no plugin that answers this, or has restarted.
        """
        known = self._known
        if known is None or known.facts.plugin is None or not known.facts.plugin.incarnation:
            return None
        try:
            plugin, version, paused = await at_once(
                self._server.plugin(deadline=deadline),
                self._server.weight_version(deadline=deadline),
                self._says_paused(known, deadline),
            )
        except EngineAnswer:
            return None
        if plugin is None or plugin.incarnation != known.incarnation:
            return None
        return known, _State(plugin, version, paused)

    async def _anew(self, deadline: float) -> tuple[_Known, _State]:
        """Ask the server for everything: what it is, and its state."""
        facts = await self._server.facts(deadline=deadline)
        incarnation, known = self._server.incarnation(facts), self._known
        if known is None or known.incarnation != incarnation:
            known = await self._meet(facts, incarnation, deadline)
        version, paused = await at_once(
            self._server.weight_version(deadline=deadline), self._says_paused(known, deadline)
        )
        return known, _State(facts.plugin, version, paused)

    async def _says_paused(self, known: _Known, deadline: float) -> bool | None:
        return await self._server.paused(deadline=deadline) if known.says_ready else None

    async def _meet(self, facts: ServerFacts, incarnation: str, deadline: float) -> _Known:
        """Choose dialect and path for a server that is new or has restarted."""
        if self._known is not None:
            await self._known.path.close()
        surface = await self._server.surface(deadline=deadline)
        chosen = choose(facts.version, surface)
        path, reason = await self._find_path(facts, chosen.profile)
        why = f"{chosen.why}, path {path.name}: {reason}"
        self._mode = None
        alone = facts.speculative_algorithm is None  # a draft model has names that the served checkpoint lacks
        checkpoint = CheckpointCheck(facts.model_path if alone else None, self.name, silent=True)
        self._known = _Known(incarnation, facts, chosen.profile, why, "/ready" in surface.paths, path, checkpoint)
        return self._known

    async def _find_path(self, facts: ServerFacts, profile: Profile) -> tuple[EnginePath, str]:
        plugin = facts.plugin
        usable = plugin is not None and plugin.protocol == orders.PROTOCOL
        if self._way == "plugin" and not usable:
            found = f"a plugin of protocol {plugin.protocol}" if plugin else "no plugin"
            raise EngineError(
                f'path = "plugin" is asked for, and {found} answers',
                engine=self.name,
                phase="probe",
                hint=f"{PLUGIN_HINT}; SGLang 0.5.12 or later; SGLANG_PLUGINS, if it is set, must name weightsync",
            )
        if self._way == "plugin" or (self._way == "auto" and usable):
            return PluginPath(self._server, profile, self._target, facts.tp_size), "our plugin answers"
        if self._way == "group":
            return GroupPath(self._server, profile, self._target), "asked for"
        gpus = await self._gpus(facts)
        if self._way == "ipc":
            from weightsync.adapters.sglang.path_ipc import IpcPath

            return IpcPath(self._server, facts, gpus), "asked for"
        reason = "asked for" if self._way == "tensor" else "no plugin answers" if plugin is None else "another plugin"
        return TensorPath(self._server, profile, self._target, gpus), reason

    async def _gpus(self, facts: ServerFacts) -> list[str | None]:
        """Return the UUIDs of its ranks' GPUs, by tp_rank; None for ranks on a CPU."""
        if facts.device != "cuda":
            return [None] * facts.tp_size
        url, named = self._http.url, self._named_gpus
        found = await asyncio.to_thread(reader_gpus, url, facts.ordinals, named=named, engine=self.name)
        return list(found)

    async def _drain(self, known: _Known, deadline: float) -> None:
        """Wait until the requests that run now have ended.

        Sends an empty update without a pause: SGLang runs it after the running requests, and holds new ones back until
        then. Versions with sessions refuse it after that wait, because no session is open.
        """
        body = {
            "serialized_named_tensors": [b64encode(dumps([])).decode()] * known.facts.tp_size,
            "load_format": "direct",
            "flush_cache": False,
        }
        try:
            await self._server.call("/update_weights_from_tensor", body, deadline=deadline)
        except EngineAnswer as answer:
            if "begin_weight_update" not in answer.reason:
                raise

    async def _serve(self, version: int, deadline: float) -> None:
        check_marked(await self._server.weight_version(deadline=deadline), version, self.name)
        await self._server.set_weight_version(serving(version), deadline=deadline)
        self._version, self._loaded = version, None

    async def _flush(self, facts: ServerFacts, deadline: float) -> None:
        """Flush what the old weights computed. With `pause="none"`, a cache that frozen requests hold stays."""
        try:
            await self._server.flush(deadline=deadline)
        except EngineAnswer as answer:
            if self._mode == "none":
                return
            raise EngineError(
                f"the weights are loaded, and the cache could not be flushed: {answer.reason.strip()}",
                engine=self.name,
                phase="finish",
                hint='pause = "keep", "wait" or "abort"; and let nobody else resume the engine during a push',
            ) from answer
        if facts.hicache_storage_backend is not None:
            await self._server.clear_storage(deadline=deadline)

    async def _wake(self, tags: tuple[str, ...], deadline: float) -> None:
        await self._server.call("/resume_memory_occupation", {"tags": list(tags)}, deadline=deadline)
        self._asleep = tuple(tag for tag in self._asleep if tag not in tags)
