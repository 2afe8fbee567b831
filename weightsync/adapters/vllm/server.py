"""One vLLM server as its paths see it: its HTTP, its profile, and what it reports of itself."""

from __future__ import annotations

import logging
from math import ceil
from typing import TYPE_CHECKING, Any

import msgspec

from weightsync.adapters.http import EngineAnswer
from weightsync.adapters.vllm.profiles import DEV_ROUTES, MARK, PROFILES, PROTOCOL, Choice, choose
from weightsync.errors import EngineError
from weightsync.plan.replay_facts import ReplayFacts, least

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.adapters.http import EngineHttp
    from weightsync.adapters.vllm.profiles import Profile

__all__ = [
    "BACKENDS",
    "OUT_OF_STEP",
    "Hello",
    "Server",
    "backend_named",
    "configured",
    "field",
    "find_routes",
    "first_names",
    "has_connector",
    "ticket_seconds",
    "version_of",
]

logger = logging.getLogger(__name__)

_WORTH_ASKING = tuple(dict.fromkeys(route for profile in PROFILES for route in profile.routes))
_GETS = ("/is_paused", "/get_world_size", "/weight_info")
OUT_OF_STEP = (
    "after a call that fails, vllm takes the answers of its other workers for those to the next "
    "(vllm-project/vllm#57846)"
)
BACKENDS = {
    "NCCLWeightTransferEngine": "nccl",
    "IPCWeightTransferEngine": "ipc",
    "SparseNCCLWeightTransferEngine": "sparse_nccl",
    "WeightSyncEngine": "weightsync",
}


class Hello(msgspec.Struct, kw_only=True):
    """The report of our plugin in one worker."""

    protocol: int
    rank: int
    platform: str
    replicas: int
    world_size: int
    incarnation: str
    weight_version: str
    pid: int = 0
    backend: str | None = None
    connector: bool = False  # its server was started with a KV connector


def ticket_seconds(deadline: float, now: float) -> float:
    """Turn a deadline into whole seconds left, at least 1, for a worker with a clock of its own."""
    return float(max(ceil(deadline - now), 1))


class Server:
    """A server whose version and routes are known."""

    def __init__(self, http: EngineHttp, version: str, choice: Choice, routes: frozenset[str], world: int) -> None:
        self.http = http
        self.engine = http.engine
        self.version = version
        self.choice = choice
        self.routes = routes
        self.world = world  # workers that read, replicas included
        self.connector = False  # it has a KV connector, which keeps keys and values outside the prefix cache
        self._settings: Any = None  # the answer of /server_info; False if it failed

    @property
    def profile(self) -> Profile:
        """The protocol that it speaks."""
        return self.choice.profile

    @classmethod
    async def find(cls, http: EngineHttp, *, deadline: float) -> Server:
        """Ask for version, routes and size. Raises `EngineError` if it is no server that takes weights."""
        version = await version_of(http, deadline=deadline)
        routes = await find_routes(http, deadline=deadline)
        choice = choose(version, routes, engine=http.engine)
        size = await http.get("/get_world_size", deadline=deadline)
        return cls(http, version, choice, routes, int(field(size, "world_size", int, "/get_world_size", http.engine)))

    async def settings(self, *, deadline: float) -> Any:
        """Ask for /server_info, once; None if it fails, as in an environment without pip."""
        if self._settings is None:
            try:
                self._settings = await self.http.get("/server_info", {"config_format": "json"}, deadline=deadline)
            except EngineAnswer:
                self._settings = False
        return self._settings or None

    async def model(self, *, deadline: float) -> str | None:
        """Ask for the model that it was started on, a path or a name on the hub; None if it does not say."""
        try:
            answer = await self.http.get("/v1/models", deadline=deadline)
            root = answer["data"][0]["root"]
        except (EngineAnswer, KeyError, IndexError, TypeError):
            return None
        return root if isinstance(root, str) else None

    async def workers(self, do: str, *, deadline: float, **request: Any) -> list[dict[str, Any]]:
        """Call our method in every worker. Raises `EngineAnswer`, or `EngineError` for an answer that is not ours."""
        body = {"method": "weightsync", "args": [msgspec.json.encode({"do": do, **request}).decode()]}
        answer = await self.http.post("/collective_rpc", body, deadline=deadline)
        results = answer.get("results") if isinstance(answer, dict) else None
        if not isinstance(results, list) or not results or not all(isinstance(one, dict) for one in results):
            what = f"the workers of {self.engine} answered {do!r} in a way that is none of ours"
            raise EngineError(what, engine=self.engine)
        return results

    async def plugin(self, *, deadline: float) -> list[Hello] | None:
        """Ask every worker for its `Hello`; None if our plugin is not in them.

        With several workers a call that cannot fail asks first whether the plugin is there: a failed call would leave a
        server without our plugin out of step.
        """
        if self.world > 1 and not await self._marked(deadline=deadline):
            return None
        try:
            return await self.hello(deadline=deadline)
        except EngineAnswer as answer:
            logger.debug("[engine=%s] no plugin: %s", self.engine, answer.reason)
            return None

    async def _marked(self, *, deadline: float) -> bool:
        answer = await self.http.post("/collective_rpc", {"method": "__dir__"}, deadline=deadline)
        results = answer.get("results") if isinstance(answer, dict) else None
        return isinstance(results, list) and bool(results) and all(MARK in names for names in results)

    async def hello(self, *, deadline: float) -> list[Hello]:
        """Ask every worker for its `Hello`. Raises `EngineAnswer` if our plugin is not in them."""
        results = await self.workers("hello", deadline=deadline)
        try:
            workers = msgspec.convert(results, list[Hello])
        except msgspec.ValidationError as error:
            raise _other(self.engine, error) from error
        if other := [worker.protocol for worker in workers if worker.protocol != PROTOCOL]:
            raise EngineError(
                f"the plugin in the workers of {self.engine} speaks protocol {other[0]}, this daemon {PROTOCOL}",
                engine=self.engine,
                hint="install the same weightsync in the engine's environment and here",
            )
        return workers


def _other(engine: str, error: msgspec.ValidationError) -> EngineError:
    return EngineError(f"the workers of {engine} speak another weightsync: {error}", engine=engine)


def told_of_replay(answers: Sequence[dict[str, Any]], engine: str) -> ReplayFacts | None:
    """Return the replay facts of the worker that replays least; None if the workers tell none, as older plugins."""
    try:
        told = [msgspec.convert(answer["replay"], ReplayFacts) for answer in answers if answer.get("replay")]
    except msgspec.ValidationError as error:
        raise _other(engine, error) from error
    return least(told)


async def configured(
    server: Server, hello: Sequence[Hello] | None, *, deadline: float
) -> tuple[str | None, bool | None]:
    """Find out a server's weight-transfer backend, and whether it takes pickles over HTTP.

    The backend is None if it was started without one; the second is None if it does not say. `hello` is what its
    workers said, if they have our plugin. Raises `EngineError` if only a call that may fail could tell, and the server
    has several workers.
    """
    try:
        info = await server.settings(deadline=deadline)
        transfer = info["vllm_config"]["weight_transfer_config"]
        backend = None if transfer is None else str(transfer["backend"])
        return backend, bool(info["vllm_env"].get("VLLM_ALLOW_INSECURE_SERIALIZATION"))
    except (KeyError, TypeError, AttributeError):
        pass
    if hello is not None:
        return hello[0].backend, None
    if server.world > 1:
        raise EngineError(
            f"the weight-transfer backend of engine {server.engine} cannot be asked for: its /server_info fails, and "
            f"its workers would have to refuse something. {OUT_OF_STEP}",
            engine=server.engine,
            phase="probe",
            hint='path = "ipc" in the node config if that is its backend, "group" if it is nccl, or our plugin in its '
            "environment",
        )
    try:
        # changes nothing: our own backend accepts it, and any other names itself in its refusal
        await server.http.post("/init_weight_transfer_engine", {"init_info": {"weightsync": 1}}, deadline=deadline)
    except EngineAnswer as answer:
        return backend_named(answer.reason), None
    return "weightsync", None


async def has_connector(server: Server, hello: Sequence[Hello] | None, *, deadline: float) -> bool:
    """Whether a server was started with a KV connector, as by `--kv-offloading-size`; `hello` as in `configured`."""
    if hello is not None:
        return hello[0].connector
    try:
        config = (await server.settings(deadline=deadline))["vllm_config"]
        return bool(config.get("kv_transfer_config") or config["cache_config"].get("kv_offloading_size"))
    except (KeyError, TypeError, AttributeError):
        return False


def backend_named(reason: str) -> str | None:
    """Return the backend that refused our init with this reason; None for no backend, or an unknown reason."""
    if "not configured" in reason or "NoneType" in reason:
        return None
    _, found, rest = reason.partition("Invalid init_info for ")
    name = rest.partition(":")[0].strip()
    return BACKENDS.get(name, name) if found else None


async def version_of(http: EngineHttp, *, deadline: float) -> str:
    """Ask for /version. Raises `EngineError` if there is no such route."""
    try:
        answer = await http.get("/version", deadline=deadline)
    except EngineAnswer as error:
        raise EngineError(f"no vllm server: {error.message}", engine=http.engine, phase="probe") from error
    return str(field(answer, "version", str, "/version", http.engine))


async def find_routes(http: EngineHttp, *, deadline: float) -> frozenset[str]:
    """Find the server's routes, from /openapi.json or by asking for each one that a profile may need."""
    try:
        document = await http.get("/openapi.json", deadline=deadline)
        paths = document["paths"]
        if isinstance(paths, dict):
            return frozenset(paths)
    except (EngineAnswer, KeyError, TypeError):
        pass  # switched off by --disable-fastapi-docs
    found = []
    for route in _WORTH_ASKING:
        if await http.has("GET" if route in _GETS else "POST", route, deadline=deadline):
            found.append(route)
        elif route in DEV_ROUTES:
            break  # the server is not in development mode, and has none of the others
    return frozenset(found)


def field(answer: Any, name: str, kind: type, call: str, engine: str) -> Any:
    """Return a field of an answer. Raises `EngineError` if it is missing or of another type."""
    value = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(value, kind):
        raise EngineError(f"{call} answered without a {name!r} that is {kind.__name__}", engine=engine)
    return value


def first_names(names: Sequence[str], count: int, most: int = 5) -> str:
    """Join the first few of `count` names for a sentence, and say how many more there are."""
    shown = list(names[:most])
    more = count - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more > 0 else "")
