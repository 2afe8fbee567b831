"""Find out what would hinder a push into a vLLM server, without changing anything."""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from weightsync.adapters.base import Finding
from weightsync.adapters.vllm.profiles import DEV_ROUTES, Choice, choose, release
from weightsync.adapters.vllm.server import Server, configured, field, find_routes, version_of
from weightsync.errors import PLUGIN_HINT, EngineError

if TYPE_CHECKING:
    from weightsync.adapters.http import EngineHttp
    from weightsync.adapters.vllm.server import Hello

__all__ = ["examine", "judge_address", "judge_backend"]

_DEV = "VLLM_SERVER_DEV_MODE=1 in its environment"
_FLAG = """--weight-transfer-config '{"backend": "weightsync"}'"""
_INSTALL = f"{PLUGIN_HINT}; then restart it: vllm.general_plugins finds weightsync"


async def examine(http: EngineHttp, path: str, *, deadline: float) -> list[Finding]:
    """Return all findings, good ones included. Raises `EngineLost` if the server does not answer."""
    findings = [judge_address(http.url)]
    version = await version_of(http, deadline=deadline)
    routes = await find_routes(http, deadline=deadline)
    if missing := [route for route in DEV_ROUTES if route not in routes]:
        findings.append(Finding(level="fail", what=f"vllm {version} answers 404 to {', '.join(missing)}", fix=_DEV))
        return findings
    try:
        choice = choose(version, routes, engine=http.engine)
    except EngineError as error:
        findings.append(Finding(level="fail", what=error.message, fix=error.hint or ""))
        return findings
    findings.append(_judge_version(version, choice))
    size = await http.get("/get_world_size", deadline=deadline)
    server = Server(http, version, choice, routes, int(field(size, "world_size", int, "/get_world_size", http.engine)))
    try:
        hello: list[Hello] | None = await server.plugin(deadline=deadline)
    except EngineError as error:
        findings.append(Finding(level="fail", what=error.message, fix="the same weightsync here and in the engine"))
        return findings
    try:
        backend, insecure = await configured(server, hello, deadline=deadline)
    except EngineError as error:
        findings.append(Finding(level="warn", what=error.message, fix=error.hint or ""))
        return findings
    findings += judge_backend(path, choice, backend, plugin=hello is not None, insecure=insecure)
    if hello is not None and hello[0].replicas > 1:
        findings.append(
            Finding(
                level="fail",
                what=f"it runs {hello[0].replicas} data-parallel replicas",
                fix="one server for each replica",
            )
        )
    return findings


def judge_address(url: str) -> Finding:
    """Judge whether others can reach the server's routes, which no key guards."""
    host = urlsplit(url).hostname or ""
    try:
        loopback = ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if loopback:
        return Finding(level="ok", what=f"it is reached at {host}; its weight routes are guarded by nothing else")
    return Finding(
        level="warn",
        what=f"it listens at {host}: anybody who reaches it may pause it and load weights, --api-key guards /v1 alone",
        fix="--host 127.0.0.1, or a firewall that lets nobody but weightsyncd through",
    )


def judge_backend(
    path: str, choice: Choice, backend: str | None, *, plugin: bool, insecure: bool | None
) -> list[Finding]:
    """Judge whether the configured path can be used."""
    found = []
    if plugin:
        found.append(Finding(level="ok", what="our plugin answers in its workers"))
        if backend != "weightsync" and path in ("auto", "plugin"):
            fix = _FLAG if choice.profile.custom_backend else ""
            what = f"its weight-transfer backend is {backend}: pushes go through /collective_rpc"
            found.append(Finding(level="warn" if fix else "ok", what=what, fix=fix))
        return found
    if path in ("plugin", "extension"):
        return [Finding(level="fail", what="our plugin is not in its workers", fix=_INSTALL)]
    found.append(Finding(level="warn", what="our plugin is not in its workers", fix=_INSTALL))
    if backend is None:
        own = {"ipc": "ipc", "group": "nccl"}.get(path)
        fix = f"""--weight-transfer-config '{{"backend": "{own}"}}'""" if own else _FLAG
        found.append(Finding(level="fail", what="it was started without a weight-transfer backend", fix=fix))
    elif backend == "nccl" and path in ("auto", "group"):
        what = "its nccl backend joins a process group with one bridge of this node, whose slots have to lie on a GPU"
        found.append(Finding(level="ok", what=what))
    elif path == "group":
        fix = """--weight-transfer-config '{"backend": "nccl"}'"""
        found.append(Finding(level="fail", what=f"its weight-transfer backend is {backend}", fix=fix))
    elif backend != "ipc":
        found.append(Finding(level="fail", what=f"its weight-transfer backend is {backend}", fix=_FLAG))
    elif insecure is False:
        found.append(
            Finding(
                level="fail",
                what="its ipc backend refuses handles that come over HTTP",
                fix="VLLM_ALLOW_INSECURE_SERIALIZATION=1 in its environment, or our plugin, which needs no pickles",
            )
        )
    elif insecure is None:
        what = "whether its ipc backend takes handles over HTTP cannot be asked"
        found.append(
            Finding(level="warn", what=what, fix="VLLM_ALLOW_INSECURE_SERIALIZATION=1 in its environment, for path ipc")
        )
    else:
        found.append(Finding(level="ok", what="its ipc backend takes handles over HTTP"))
    return found


def _judge_version(version: str, choice: Choice) -> Finding:
    number = release(version)
    known = number is not None and choice.profile.first <= number <= choice.profile.last
    what = f"vllm {version}, protocol {choice.profile.name}: {choice.why}"
    if known and choice.profile.verified != "from source only":
        return Finding(level="ok", what=what)
    return Finding(level="warn", what=what, fix="push to one such server before a fleet of them")
