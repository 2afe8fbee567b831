"""The adapter of one vLLM server, in the daemon.

Protocol (`profiles.py`) and path (`path_plugin.py`, `path_ipc.py`, `path_group.py`) are chosen once for each
incarnation of the server. This module does everything that is the same on all paths: pausing, waking, the prefix cache,
and the weight version that marks a torn server.
"""

from __future__ import annotations

import asyncio
import re
from functools import partial
from typing import TYPE_CHECKING, Any

from weightsync.adapters import versions
from weightsync.adapters.base import EngineInfo
from weightsync.adapters.checkpoint import CheckpointCheck
from weightsync.adapters.http import EngineAnswer, EngineHttp, at_once
from weightsync.adapters.lora import LoraRoutes
from weightsync.adapters.readers import reader_gpus
from weightsync.adapters.replaying import ReplayingAdapter
from weightsync.adapters.vllm import doctor
from weightsync.adapters.vllm.path_group import GroupPath
from weightsync.adapters.vllm.path_ipc import IpcPath
from weightsync.adapters.vllm.path_plugin import ExtensionPath, PluginPath
from weightsync.adapters.vllm.server import Server, configured, field, has_connector
from weightsync.errors import PLUGIN_HINT, EngineError, EngineLost, EngineRefused, LocalProtocolError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.adapters import EngineSpec
    from weightsync.adapters.base import Finding, PauseMode
    from weightsync.adapters.connection import HttpClient
    from weightsync.adapters.vllm.path import EnginePath
    from weightsync.adapters.vllm.server import Hello
    from weightsync.plan.manifest import Manifest

__all__ = ["VLLMAdapter"]

_STARTED = re.compile(r"^process_start_time_seconds (\S+)$", re.MULTILINE)
_SLEEPS = re.compile(r'^vllm:engine_sleep_state\{[^}]*sleep_state="(\w+)"[^}]*\} (\d+(?:\.\d+)?)$', re.MULTILINE)
_STOCK = {"ipc": "ipc", "nccl": "group"}  # vLLM's own backend → our path through it
_MODES = {"keep": "keep", "wait": "wait", "abort": "abort", "none": "keep"}
_INSTALL = f"""{PLUGIN_HINT}; then start it with --weight-transfer-config '{{"backend": "weightsync"}}'"""


class VLLMAdapter(ReplayingAdapter):
    """Drives one vLLM server. `client` replaces the network in tests."""

    def __init__(self, spec: EngineSpec, *, client: HttpClient | None = None) -> None:
        super().__init__(spec.name)
        self._spec = spec
        self._http = EngineHttp(spec, client=client)
        self.loras = LoraRoutes(self._http, "/v1", "with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1")
        self._started: str | None = None  # when the server's process started, from its metrics
        self._began_in: str | None = None  # `_started` as it was when the last update began
        self._checkpoint: CheckpointCheck | None = None
        self._path: EnginePath | None = None
        self._why = ""
        self._info: EngineInfo | None = None
        self._mode: PauseMode = "keep"
        self._version = "default"  # its weight version, as last read or set
        self._loaded: int | None = None  # a version that is loaded but not served yet
        self._sleeps = self._released = False  # at the last probe its metrics said: weights asleep, KV cache released
        self._woken = False  # its weights were woken for an update; the rest sleeps until it resumes

    def __repr__(self) -> str:
        return f"VLLMAdapter({self.name!r}, {self._spec.url!r})"

    async def probe(self, *, deadline: float) -> EngineInfo:
        path = self._path
        if path is None or not path.server.profile.keeps_version:
            # Metrics first: asking workers for the version would fail if the server was restarted without our plugin,
            # and a failed call leaves its workers out of step.
            started, slept = await self._metrics(deadline=deadline)
            state: Any = None
        else:
            told, state = await asyncio.gather(  # if the server has restarted, `state` is dropped and asked for again
                self._metrics(deadline=deadline), self._state(path, deadline), return_exceptions=True
            )
            if isinstance(told, BaseException):
                raise told
            started, slept = told
        if path is None or (started and started != self._started):
            path, self._why = await self._find_path(deadline=deadline)
            self._path, self._started = path, started
            self._checkpoint, state = None, None
        if isinstance(state, BaseException):
            raise state
        if state is None:
            state = await self._state(path, deadline)
        paused, self._version = state
        self._sleeps, self._released = "weights" in (slept or ()), "kv_cache" in (slept or ())
        asleep = self._sleeps if slept is not None else await self._asleep(deadline=deadline)
        incarnation = started or self._started or await path.incarnation(deadline=deadline)
        server, said = path.server, versions.read(self._version)
        self._info = EngineInfo(
            software=f"vllm {server.version}",
            profile=self._why,
            tp_size=server.world,
            version=said.version,
            paused=paused,
            torn=said.torn,
            transport=path.transport,
            incarnation=incarnation,
            asleep=asleep,
            replay=path.replay,
        )
        return self._info

    async def accept(self, manifest: Manifest, *, deadline: float) -> tuple[str, ...] | None:
        """See the base class. Stock servers do not tell which names they know: an unknown name fails to load."""
        path, info = self._probed()
        single = await self._http.get("/get_world_size", {"include_dp": "false"}, deadline=deadline)
        if (each := single.get("world_size") if isinstance(single, dict) else None) != path.server.world:
            raise EngineRefused(
                f"it runs {path.server.world} workers, and {each} hold the model: data parallelism is not supported",
                engine=self.name,
                phase="accept",
                hint="one server for each replica",
            )
        if self._checkpoint is None:
            model = None if self._spec.target == "draft" else await path.server.model(deadline=deadline)
            self._checkpoint = CheckpointCheck(model, self.name)
        whole = "it is torn" if info.torn else "it sleeps" if info.asleep else ""
        await self._checkpoint.refuse(manifest, whole=whole)
        return await path.accept(manifest, whole=info.torn or info.asleep, deadline=deadline)

    async def pause(self, mode: PauseMode, *, deadline: float) -> None:
        """See the base class. vLLM cannot load while requests run, so "none" is a "keep" that keeps their KV cache."""
        self._mode, self._loaded = mode, None  # a version that an earlier push loaded is not served any more
        await self._http.call(
            "POST", "/pause", params={"mode": _MODES[mode], "clear_cache": "false"}, deadline=deadline
        )

    async def begin(
        self, version: int, manifest: Manifest, offers: Sequence[Sequence[bytes]], *, deadline: float
    ) -> None:
        path, info = self._probed()
        self._loaded, self._began_in = None, self._started
        before = versions.read(self._version)
        self._version = versions.updating(before.version, version)
        await path.set_weight_version(self._version, deadline=deadline)
        if info.asleep:  # waking the last part that sleeps also resumes the server, so it is paused again
            await self._http.call("POST", "/wake_up", params={"tags": "weights"}, deadline=deadline)
            await self.pause(self._mode, deadline=deadline)
            self._woken = True
        pull, anew = self._unchecked(manifest)
        if (ours := self._replaying()) is not None:
            await ours.begin(version, manifest, offers, torn=before.torn, pull=pull, anew=anew, deadline=deadline)
        else:
            await path.begin(version, manifest, offers, torn=before.torn, deadline=deadline)

    async def load(self, bucket: int, tickets: Sequence[bytes], *, deadline: float) -> None:
        await self._probed()[0].load(bucket, tickets, deadline=deadline)

    async def load_several(self, first: int, tickets: Sequence[Sequence[bytes]], *, deadline: float) -> None:
        await self._probed()[0].load_several(first, tickets, deadline=deadline)

    async def finish(self, version: int, *, deadline: float) -> None:
        path, _ = self._probed()
        await path.finish(deadline=deadline)
        await self._flush(path.server, deadline=deadline)
        self._loaded = version

    async def resume(self, *, deadline: float) -> None:
        """See the base class. Sets the version only now: a loaded engine counts as torn until it is verified.

        An engine that sleeps and was not woken for this push stays asleep.
        """
        if self._loaded is not None:
            await self._serve(self._loaded, deadline)
        if self._sleeps and not self._woken:
            return
        if self._woken or self._released:
            await self._http.call("POST", "/wake_up", params={"tags": "kv_cache"}, deadline=deadline)
            self._woken = self._released = False
        await self._http.post("/resume", deadline=deadline)

    async def examine(self, *, deadline: float) -> Sequence[Finding]:
        return await doctor.examine(self._http, self._spec.path, deadline=deadline)

    async def close(self) -> None:
        await self._http.close()

    def _replaying(self) -> ExtensionPath | None:
        return self._path if isinstance(self._path, ExtensionPath) else None

    def _probed(self) -> tuple[EnginePath, EngineInfo]:
        if self._path is None or self._info is None:
            raise LocalProtocolError(f"engine {self.name!r} was not probed", engine=self.name)
        return self._path, self._info

    async def _state(self, path: EnginePath, deadline: float) -> tuple[bool, str]:
        """Ask whether it is paused, and for its weight version."""
        return await at_once(self._paused(deadline), path.weight_version(deadline=deadline))

    async def _paused(self, deadline: float) -> bool:
        answer = await self._http.get("/is_paused", deadline=deadline)
        return bool(field(answer, "is_paused", bool, "/is_paused", self.name))

    async def _metrics(self, *, deadline: float) -> tuple[str, frozenset[str] | None]:
        """Read from its metrics when the server's process started, and which tags of its memory sleep.

        Returns "" or None for whichever the metrics do not tell.
        """
        try:
            metrics = await self._http.get("/metrics", deadline=deadline)
        except EngineAnswer:
            metrics = None
        if not isinstance(metrics, str):
            return "", None
        started, states = _STARTED.search(metrics), [(state, float(on) > 0) for state, on in _SLEEPS.findall(metrics)]
        weights = any(on for state, on in states if state in ("weights_offloaded", "discard_all"))
        cache = weights or ("awake", False) in states  # without `weights`: released alone, or only scheduling sleeps
        slept = frozenset(["weights"] * weights + ["kv_cache"] * cache)
        return started[1] if started else "", slept if states else None

    async def _asleep(self, *, deadline: float) -> bool:
        """Whether the server sleeps or is paused: /is_sleeping does not tell these apart."""
        try:
            answer = await self._http.get("/is_sleeping", deadline=deadline)
        except EngineAnswer:
            return False
        return bool(isinstance(answer, dict) and answer.get("is_sleeping"))

    async def _find_path(self, *, deadline: float) -> tuple[EnginePath, str]:
        """Choose the path that the config asks for, or the best one; also returns a line that says why."""
        server = await Server.find(self._http, deadline=deadline)
        draft = self._spec.target == "draft"
        stock = self._spec.path in ("ipc", "group")
        if draft and not server.profile.draft and stock:
            raise EngineError(
                f"vllm {server.version} cannot update a draft model alone", engine=self.name, hint="vllm 0.26 or later"
            )
        wanted, why = self._spec.path, "as configured"
        hello: list[Hello] | None = None
        if not stock:
            hello = await server.plugin(deadline=deadline)
            if hello is None and wanted != "auto":
                raise EngineError("our plugin is not in its workers", engine=self.name, hint=_INSTALL)
        if wanted == "auto":
            wanted, why = await self._best(server, hello, deadline=deadline)
        path: EnginePath
        match wanted:
            case "plugin" if server.profile.custom_backend and not (draft and not server.profile.draft):
                path = PluginPath(server, draft=draft)
            case "plugin" | "extension":
                path = ExtensionPath(server, draft=draft)
            case "group":
                path = GroupPath(server, draft=draft)
            case "ipc":
                path = IpcPath(server, draft=draft, gpus=partial(self._gpus, server.world))
            case _:
                raise EngineError(f"there is no way {wanted!r} into vllm", engine=self.name)
        server.connector = await has_connector(server, hello, deadline=deadline)
        memory = "" if path.keeps_version or server.profile.keeps_version else "; its version is remembered here only"
        return path, f"{server.profile.name} ({server.choice.why}), path {path.name}: {why}{memory}"

    def _gpus(self, world: int) -> Sequence[str]:
        """Return each worker's GPU: vLLM gives rank n the n-th GPU that its server sees."""
        return reader_gpus(self._spec.url, range(world), named=self._spec.gpus, engine=self.name)

    async def _best(self, server: Server, hello: list[Hello] | None, *, deadline: float) -> tuple[str, str]:
        if hello is not None:
            if hello[0].backend == "weightsync":
                return "plugin", "our backend is configured"
            return "extension", f"our plugin answered, the configured backend is {hello[0].backend}"
        backend, _ = await configured(server, hello, deadline=deadline)
        if backend in _STOCK:
            return _STOCK[backend], f"no plugin answered, the backend is {backend}"
        raise EngineError(
            f"there is no way into it: no plugin answered, and its weight-transfer backend is {backend}",
            engine=self.name,
            phase="probe",
            hint=_INSTALL,
        )

    async def _serve(self, version: int, deadline: float) -> None:
        path, _ = self._probed()
        if path.keeps_version or path.server.profile.keeps_version:
            versions.check_marked(await path.weight_version(deadline=deadline), version, self.name)
        else:
            started, _ = await self._metrics(deadline=deadline)
            if started and self._began_in and started != self._began_in:
                raise EngineLost(
                    f"engine {self.name} was restarted during the push",
                    engine=self.name,
                    phase="resume",
                    hint="the next push brings it up to date",
                )
        text = versions.serving(version)
        await path.set_weight_version(text, deadline=deadline)
        self._version, self._loaded = text, None

    async def _flush(self, server: Server, *, deadline: float) -> None:
        """Drop what the old weights computed. Running requests are computed anew, except with `pause="none"`."""
        kept = self._mode == "none"
        params = {"reset_running_requests": "false" if kept else "true"}
        if server.connector:  # without a connector, older servers report a failure (vllm-project/vllm#42693)
            params["reset_external"] = "true"
        answer: Any = await self._http.call("POST", "/reset_prefix_cache", params=params, deadline=deadline)
        # older versions answer with 200 and no body, whatever happened
        if isinstance(answer, dict) and answer.get("success") is False and not kept:
            raise EngineError(
                f"the prefix cache of engine {self.name} could not be reset", engine=self.name, phase="finish"
            )
        if "/reset_encoder_cache" in server.routes:  # last: preempted requests give back what they hold of it
            await self._http.post("/reset_encoder_cache", deadline=deadline)
