"""The HTTP endpoints of one SGLang server, and the meaning of their answers.

Replies to commands have `success` and `message`; a `success` of false is a failure whatever the status. The server
keeps our version as its weight version. It does not say whether its memory was released, nor, before 0.5.20, whether it
is paused. Our plugin adds both to `/server_info`, which is also how the plugin is found, and answers them to an order.
"""

from __future__ import annotations

import hashlib
import ipaddress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from weightsync.adapters.http import EngineAnswer
from weightsync.adapters.sglang import orders
from weightsync.adapters.sglang.profiles import Surface, surface_of
from weightsync.errors import EngineError
from weightsync.plan.replay_facts import ReplayFacts

if TYPE_CHECKING:
    from weightsync.adapters.http import EngineHttp

__all__ = ["PluginState", "Server", "ServerFacts"]

_PROBED = (
    ("POST", "/begin_weight_update"),
    ("POST", "/end_weight_update"),
    ("GET", "/server_info"),
    ("GET", "/model_info"),
    ("GET", "/ready"),
    ("POST", "/pause_generation"),
    ("POST", "/continue_generation"),
    ("POST", "/update_weight_version"),
    ("POST", "/update_weights_from_tensor"),
    ("POST", "/update_weights_from_ipc"),
)
"""Paths asked for one by one if /openapi.json is switched off. /flush_cache takes any method, so it is not here."""


class PluginState(msgspec.Struct, frozen=True):
    """Our plugin's part of `/server_info`, and its answer to `orders.State`."""

    protocol: int
    incarnation: str = ""  # drawn at random when the scheduler started; "" from a plugin that has no `orders.State`
    paused: bool = False
    asleep: tuple[str, ...] = ()  # tags of the memory that was released
    requantises: bool = False  # layers quantised themselves at start, and the plugin can have them do so again
    replay: ReplayFacts | None = None  # rank 0's


class _Internal(msgspec.Struct, frozen=True):
    weightsync: PluginState | None = None


class ServerFacts(msgspec.Struct, frozen=True):
    """The part of `/server_info` that matters here, under SGLang's own names."""

    version: str
    tp_size: int = 1
    dp_size: int = 1
    pp_size: int = 1
    device: str | None = None
    model_path: str | None = None
    base_gpu_id: int = 0
    gpu_id_step: int = 1
    random_seed: int | None = None
    startup_time: Any = None
    quantization: str | None = None
    load_format: str | None = None
    weight_cache_mode: str = "off"
    enable_memory_saver: bool = False
    tokenizer_worker_num: int = 1
    speculative_algorithm: str | None = None
    enable_lora: bool | None = None
    hicache_storage_backend: str | None = None
    internal_states: tuple[_Internal, ...] = ()

    @property
    def ordinals(self) -> tuple[int, ...]:
        """CUDA device numbers of its ranks' GPUs inside its process, by tp_rank."""
        return tuple(self.base_gpu_id + rank * self.gpu_id_step for rank in range(self.tp_size))

    @property
    def plugin(self) -> PluginState | None:
        """Our plugin's part of the answer; None if the plugin is not loaded."""
        return self.internal_states[0].weightsync if self.internal_states else None


class Server:
    """The endpoints of one server. Every method raises as `EngineHttp` does, and `EngineError` for a failure."""

    def __init__(self, http: EngineHttp) -> None:
        self.http = http
        self.engine = http.engine

    async def facts(self, *, deadline: float) -> ServerFacts:
        """Ask for `/server_info`."""
        answer = await self.http.get("/server_info", deadline=deadline)
        try:
            return msgspec.convert(answer, ServerFacts, strict=False)
        except msgspec.ValidationError as error:
            raise EngineError(
                f"/server_info is not that of an SGLang server: {error}",
                engine=self.engine,
                phase="probe",
                hint="the engine's own URL, not that of a router",
            ) from error

    async def plugin(self, *, deadline: float) -> PluginState | None:
        """Ask our plugin for its state; None if no plugin answers this order.

        `/server_info` takes several times as long: it collects a few hundred settings, twice.
        """
        try:
            answer = await self.call("/weights_checker", {"action": orders.encode(orders.State())}, deadline=deadline)
            return msgspec.json.decode(answer, type=PluginState)
        except (EngineAnswer, msgspec.DecodeError):
            return None

    async def surface(self, *, deadline: float) -> Surface:
        """Find out which endpoints the server has."""
        try:
            found = surface_of(await self.http.get("/openapi.json", deadline=deadline))
        except EngineAnswer:  # DISABLE_OPENAPI_DOC
            found = None
        if found is not None:
            return found
        paths = [path for method, path in _PROBED if await self.http.has(method, path, deadline=deadline)]
        return Surface(frozenset(paths) | {"/flush_cache"})

    async def paused(self, *, deadline: float) -> bool:
        """Whether the server takes no requests. Only for servers that have /ready (0.5.20)."""
        try:
            await self.http.get("/ready", deadline=deadline)
        except EngineAnswer as answer:
            if answer.status != HTTPStatus.SERVICE_UNAVAILABLE:
                raise
            return True
        return False

    async def weight_version(self, *, deadline: float) -> object:
        """Return the string that says which weights the server holds."""
        info = await self.http.get("/model_info", deadline=deadline)
        return info.get("weight_version") if isinstance(info, dict) else None

    async def set_weight_version(self, text: str, *, deadline: float) -> None:
        """Set that string. Requests go on; by default SGLang would abort them all."""
        await self.call("/update_weight_version", {"new_version": text, "abort_all_requests": False}, deadline=deadline)

    async def flush(self, *, deadline: float) -> None:
        """Flush every cached prefix. Raises `EngineAnswer` while requests are running."""
        await self.http.post("/flush_cache", deadline=deadline)

    async def clear_storage(self, *, deadline: float) -> None:
        """Clear what HiCache keeps outside the server. Raises `EngineAnswer` if the server has no HiCache."""
        await self.http.post("/hicache/storage-backend/clear", deadline=deadline)

    async def call(self, path: str, body: dict[str, Any], *, deadline: float) -> str:
        """POST, and return the message of a success. Raises `EngineError` with the server's own words for a failure."""
        answer = await self.http.post(path, body, deadline=deadline)
        if not isinstance(answer, dict):
            return ""
        message = str(answer.get("message", ""))
        if answer.get("success") is False:
            raise EngineAnswer(f"POST {path}", HTTPStatus.OK, message or "no reason given", engine=self.engine)
        return message

    def incarnation(self, facts: ServerFacts) -> str:
        """Return a string that changes when the server restarts.

        Our plugin draws one. Without the plugin it is a hash of facts that a restart changes. Newer servers tell how
        long each step of their start took. All draw a random seed unless it is set. On this machine the listening
        socket has an inode number, which no earlier socket had.
        """
        if facts.plugin is not None and facts.plugin.incarnation:
            return facts.plugin.incarnation
        seen = msgspec.json.encode([facts.version, facts.random_seed, facts.startup_time, _listening(self.http.url)])
        return hashlib.blake2b(seen, digest_size=8).hexdigest()


def _listening(url: str) -> list[str]:
    """Return the inodes of sockets that listen on the port of a loopback `url`; empty for any other host."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    host = parts.hostname or ""
    try:
        if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
            return []
    except ValueError:
        return []
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(table) as lines:
                rows = [line.split() for line in lines]
        except OSError:
            continue
        found += [row[9] for row in rows[1:] if row[3] == "0A" and row[1].endswith(f":{port:04X}")]
    return sorted(found)
