"""The node config: TOML, checked as a whole before anything is started.

`load_node_config(path)` returns a frozen `NodeConfig`, or raises one `ConfigError` that lists every mistake with its
key and a correct value. Secrets are never in the file: an engine's key is read from the environment variable that
`api_key_env` names. A complete example is in docs/configuration.md; the smallest useful one is

    [[engines]]
    name = "e0"
    kind = "reference"
    url = "http://127.0.0.1:8000"
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from weightsync.adapters import KINDS, PATHS
from weightsync.endpoints import KEY_HINT, check_endpoint, default_endpoint, is_here, is_loopback, url_problems
from weightsync.engine_config import EngineConfig, Name
from weightsync.errors import ConfigError
from weightsync.wire.keys import read_key_file

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "ArenaConfig",
    "ClusterConfig",
    "EngineConfig",
    "HttpConfig",
    "LogConfig",
    "NodeConfig",
    "NodeSection",
    "TimeoutConfig",
    "checked",
    "load_node_config",
    "parse_node_config",
]

_ANYWHERE = ("*", "0.0.0.0", "::")
Size = Annotated[int, Meta(ge=0)]  # in TOML: 268435456 or "256MiB"
Seconds = Annotated[float, Meta(gt=0, le=86400)]
_UNITS = {"": 1, "B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections but [[engines]]."""


class NodeSection(_Section, frozen=True):
    """[node]: who this daemon is and where it listens."""

    name: Name = "node0"
    listen: str = ""  # endpoint for trainers and other daemons; default: a socket in the user's runtime directory
    bridges: Annotated[int, Meta(ge=0, le=64)] = 0  # bridge processes; 0: one for each GPU, or one
    gpus: tuple[str, ...] = ()  # UUIDs of the GPUs that slots lie on; none: all that weightsyncd sees
    shm_dir: str = "/dev/shm"
    retain: Literal["none", "host"] = "none"  # host: keep the last push in host memory, for engines that are late


class ArenaConfig(_Section, frozen=True):
    """[arena]: the memory each bridge keeps for buckets under way."""

    slots: Annotated[int, Meta(ge=1, le=1024)] = 3  # fill, wire and load of neighbouring buckets overlap from 3 on
    slot_bytes: Size = 0  # 0: chosen, on GPUs by their free memory
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where slots lie; auto: on GPUs if there are any
    alignment: Annotated[int, Meta(ge=1, le=2**20)] = 256  # bytes; of each tensor in a slot


class TimeoutConfig(_Section, frozen=True):
    """[timeouts], in seconds."""

    operation: Seconds = 60.0  # one step at one engine, bridge or node
    liveness: Seconds = 5.0  # silence after which a trainer rank or a node counts as lost
    grace: Seconds = 5.0  # beyond `operation`, for work still under way when a push has ended
    probe: Seconds = 2.0  # one look at an engine
    probe_every: Seconds = 5.0  # between looks at idle engines
    stop: Seconds = 15.0  # on SIGTERM, for a push under way to end
    bridge_start: Seconds = 30.0


class ClusterConfig(_Section, frozen=True):
    """[cluster]: other nodes, whose engines pushes from here reach too."""

    listen: str = ""  # tcp://ADDRESS:PORT, where other nodes reach this one
    key_file: str = ""  # made by `weightsync keygen`, the same on every node; needed beyond loopback
    address: str = "127.0.0.1"  # this node's address for communicators
    peers: dict[str, str] = {}  # node name = endpoint
    seed: str = ""  # tcp://ADDRESS:PORT of one node, maybe this one, that tells the others of each other


class HttpConfig(_Section, frozen=True):
    """[http]: /metrics and /healthz; off unless `listen` is given."""

    listen: str = ""  # "127.0.0.1:9464"


class LogConfig(_Section, frozen=True):
    """[log]"""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["human", "json"] = "human"
    trace_dir: str = ""  # directory for a Perfetto file of every push that begins here; the newest 20 are kept


class NodeConfig(_Section, frozen=True):
    """A whole node config."""

    node: NodeSection = NodeSection()
    arena: ArenaConfig = ArenaConfig()
    timeouts: TimeoutConfig = TimeoutConfig()
    cluster: ClusterConfig = ClusterConfig()
    http: HttpConfig = HttpConfig()
    log: LogConfig = LogConfig()
    engines: tuple[EngineConfig, ...] = ()

    @property
    def endpoint(self) -> str:
        return self.node.listen or default_endpoint(self.node.name)


def load_node_config(path: str | os.PathLike[str], changes: Sequence[str] = ()) -> NodeConfig:
    """Read and check a node config. `changes`, such as "node.name=node7", override the file.

    Raises `ConfigError` listing every mistake.
    """
    try:
        text = Path(path).read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"cannot read the node config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the node config {path} is not UTF-8 text: {error}") from error
    return parse_node_config(text, str(path), changes)


def parse_node_config(text: str, name: str = "node config", changes: Sequence[str] = ()) -> NodeConfig:
    """Check a node config given as TOML text. Raises `ConfigError` listing every mistake."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} is not TOML: {error}") from error
    problems: list[str] = []
    for change in changes:
        _set(table, change)
    sections: dict[str, Any] = {}
    known = {f.name: f.type for f in msgspec.structs.fields(NodeConfig)}
    for key, value in table.items():
        if key not in known:
            problems.append(f"[{key}]: unknown section{_meant(key, known)}")
        elif key == "engines":
            sections[key] = _engines(value, problems)
        elif not isinstance(value, dict):
            problems.append(f"{key}: must be a section, written [{key}]")
        else:
            sections[key] = _section(known[key], value, key, problems)
    if problems:
        raise _mistakes(name, problems)
    return checked(NodeConfig(**sections), name)


def _set(table: dict[str, Any], change: str) -> None:
    """Apply one change, "SECTION.KEY=VALUE", to the table. A value that is not TOML is taken as a string."""
    place, equals, text = change.partition("=")
    section, dot, key = place.strip().partition(".")
    named = bool(equals and dot and section and key) and section != "engines"
    if not named or not isinstance(table.setdefault(section, {}), dict):
        raise ConfigError(f"--set {change}: write it as SECTION.KEY=VALUE, such as node.name=node7")
    try:
        table[section][key] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[section][key] = text


def checked(config: NodeConfig, name: str = "node config") -> NodeConfig:
    """Return `config`, whose keys are valid one by one. Raises `ConfigError` if they contradict each other."""
    if problems := _contradictions(config):
        raise _mistakes(name, problems)
    return config


def _mistakes(name: str, problems: list[str]) -> ConfigError:
    many = f"{len(problems)} mistakes" if len(problems) > 1 else "a mistake"
    return ConfigError(f"{name} has {many}:\n" + "\n".join(f"  - {p}" for p in problems))


def _engines(value: Any, problems: list[str]) -> tuple[EngineConfig, ...]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        problems.append("engines: must be a list of sections, each written [[engines]]")
        return ()
    found = [_section(EngineConfig, item, f"engines[{i}]", problems) for i, item in enumerate(value)]
    return tuple(engine for engine in found if engine is not None)


S = TypeVar("S", bound=msgspec.Struct)


def _section(kind: type[S], table: dict[str, Any], path: str, problems: list[str]) -> S | None:
    """Return one section; None if keys are wrong, with a sentence for each added to `problems`."""
    before = len(problems)
    fields = {f.name: f for f in msgspec.structs.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in fields:
            problems.append(f"{path}.{key}: unknown key{_meant(key, fields)}")
            continue
        try:
            plain = _size(value) if fields[key].type is Size else value
            values[key] = msgspec.convert(plain, fields[key].type)
        except msgspec.ValidationError as error:
            allowed = get_args(fields[key].type) if get_origin(fields[key].type) is Literal else ()
            right = f"; one of {', '.join(allowed)}" if allowed else ""
            problems.append(f"{path}.{key} = {value!r}: {str(error).lower()}{right}")
        except ValueError as error:
            problems.append(f"{path}.{key} = {value!r}: {error}")
    problems.extend(f"{path}.{name}: is missing" for name, f in fields.items() if f.required and name not in table)
    return kind(**values) if len(problems) == before else None


def _size(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+)\s*([A-Za-z]*)\s*", value)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError('not a size; write bytes or a string such as "256MiB"')
    return int(match[1]) * _UNITS[match[2].upper()]


def _meant(key: str, known: Any) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(sorted(known))}"


def _contradictions(config: NodeConfig) -> list[str]:
    """Return the problems that no single key shows."""
    problems = []
    seen: dict[str, int] = {}
    for i, engine in enumerate(config.engines):
        where = f"engines[{i}]"
        if engine.kind not in KINDS:
            problems.append(f"{where}.kind = {engine.kind!r}: one of {', '.join(sorted(KINDS))}")
        elif engine.path not in PATHS[engine.kind]:
            problems.append(f"{where}.path = {engine.path!r}: one of {', '.join(PATHS[engine.kind])}")
        problems.extend(f"{where}.url: {problem}" for problem in url_problems(engine.url))
        if engine.kind == "vllm" and engine.path == "ipc" and config.arena.slots < 2:
            problems.append(
                f"{where}.path = 'ipc': vLLM holds a bucket until the next one comes: arena.slots of at least 2"
            )
        if engine.ca_file is not None and not os.access(engine.ca_file, os.R_OK):
            problems.append(f"{where}.ca_file = {engine.ca_file!r}: no file that can be read")
        if engine.name in seen:
            problems.append(f"{where}.name = {engine.name!r}: engines[{seen[engine.name]}] has it already")
        seen.setdefault(engine.name, i)
        host = urlsplit(engine.url).hostname if not url_problems(engine.url) else None
        if engine.path == "group" and host and is_loopback(config.cluster.address) and not is_here(host):
            problems.append(
                f"{where}.path = 'group': the engine on {host} is to join a group at cluster.address, and "
                f"{config.cluster.address} is its own machine there; give an address of this node that it reaches"
            )
        if engine.api_key_env and host and engine.url.startswith("http://") and not is_loopback(host):
            problems.append(f"{where}.url = {engine.url!r}: its key would be sent in the clear; use https, or loopback")
        if engine.api_key_env and engine.api_key is None:
            problems.append(f"{where}.api_key_env: the environment variable {engine.api_key_env} is not set")
    if config.arena.alignment % 8:
        problems.append(f"arena.alignment = {config.arena.alignment}: must be a multiple of 8, the largest element")
    if config.arena.slot_bytes % config.arena.alignment:
        problems.append(f"arena.slot_bytes: must be a multiple of arena.alignment ({config.arena.alignment})")
    if config.node.name in config.cluster.peers:
        problems.append(f"cluster.peers.{config.node.name}: is this node itself")
    if config.http.listen:
        host, _, port = config.http.listen.rpartition(":")
        if not port.isdigit() or not 0 < int(port) < 65536 or not host:
            problems.append(f"http.listen = {config.http.listen!r}: write it as 127.0.0.1:9464")
        elif not is_loopback(host):
            problems.append(f"http.listen = {config.http.listen!r}: only loopback; put a proxy in front to go beyond")
    problems.extend(_cluster_problems(config))
    return problems


def _cluster_problems(config: NodeConfig) -> list[str]:
    cluster, problems = config.cluster, []
    keys = bool(cluster.key_file)
    if not is_loopback(cluster.address) and not keys:
        problems.append(f"cluster.address = {cluster.address!r} reaches beyond this machine; {KEY_HINT}")
    if cluster.listen and not cluster.listen.startswith("tcp://"):
        problems.append(f"cluster.listen = {cluster.listen!r}: write it as tcp://ADDRESS:PORT")
    endpoints = [("node.listen", config.node.listen, False), ("cluster.listen", cluster.listen, keys)]
    endpoints += [(f"cluster.peers.{name}", endpoint, keys) for name, endpoint in cluster.peers.items()]
    if cluster.seed:
        endpoints.append(("cluster.seed", cluster.seed, keys))
        if not cluster.listen:
            problems.append("cluster.seed: needs a cluster.listen, at which the others reach this node")
        elif urlsplit(cluster.listen).hostname in _ANYWHERE:
            problems.append(f"cluster.listen = {cluster.listen!r}: the others are told to call there; give an address")
    for key, endpoint, keyed in endpoints:
        listens = key.endswith(".listen")
        try:
            if endpoint or not listens:
                check_endpoint(endpoint, key, keys=keyed)
            if not listens and urlsplit(endpoint).hostname in _ANYWHERE:
                problems.append(f"{key} = {endpoint!r} is no address that can be called")
        except ConfigError as error:
            problems.append(error.message + (f"; {error.hint}" if error.hint else ""))
    if keys:
        try:
            read_key_file(cluster.key_file)
        except ConfigError as error:
            problems.append(f"cluster.key_file: {error.message}" + (f"; {error.hint}" if error.hint else ""))
    return problems
