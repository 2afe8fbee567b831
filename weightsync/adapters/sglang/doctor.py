"""Find out what would hinder a push into an SGLang server, without changing anything."""

from __future__ import annotations

import ipaddress
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from weightsync.adapters.base import Finding
from weightsync.adapters.http import EngineAnswer
from weightsync.adapters.sglang import orders
from weightsync.adapters.sglang.path import refuse_server
from weightsync.errors import PLUGIN_HINT, EngineRefused

if TYPE_CHECKING:
    from weightsync.adapters.sglang.profiles import Profile
    from weightsync.adapters.sglang.server import Server, ServerFacts

__all__ = ["examine"]

_NO_MODE = "weightsync-doctor"  # no such pause mode: a caller with the key is told so, any other gets 401 or 403


async def examine(
    server: Server,
    facts: ServerFacts,
    profile: Profile,
    why: str,
    *,
    target: str,
    keyed: bool,
    plugin: bool,
    deadline: float,
) -> list[Finding]:
    """Return the findings about one server that was probed."""
    findings = [_dialect(facts, profile, why), await _key(server, keyed, deadline)]
    try:
        refuse_server(facts, profile, target, server.engine, plugin=plugin)
    except EngineRefused as refusal:
        findings.append(Finding(level="fail", what=refusal.message, fix=refusal.hint or ""))
    findings += [_plugin(facts, profile), _memory(facts)]
    return findings


def _dialect(facts: ServerFacts, profile: Profile, why: str) -> Finding:
    what = f"sglang {facts.version}: {why}"
    if profile.ran:
        return Finding(level="ok", what=what)
    return Finding(level="warn", what=what, fix="try one push in a test set-up, or use SGLang 0.5.23")


async def _key(server: Server, keyed: bool, deadline: float) -> Finding:
    """Check that we may call the endpoints that change weights, and warn if anybody may."""
    try:
        await server.http.post("/pause_generation", {"mode": _NO_MODE}, deadline=deadline)
    except EngineAnswer as answer:
        if answer.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            return Finding(
                level="fail",
                what="its weight endpoints do not take our key",
                fix="api_key_env with the server's --admin-api-key, or --api-key where it has no other",
            )
    if not keyed and not _loopback(server.http.url):
        return Finding(
            level="warn",
            what="its weight endpoints are open to everybody who reaches its port",
            fix="--admin-api-key on the server, and api_key_env here",
        )
    return Finding(level="ok", what="its weight endpoints take our calls")


def _plugin(facts: ServerFacts, profile: Profile) -> Finding:
    plugin = facts.plugin
    if plugin is not None and plugin.protocol == orders.PROTOCOL:
        return Finding(level="ok", what="our plugin is loaded: no pickles, checked names, checked bytes")
    if plugin is not None:
        return Finding(
            level="warn",
            what=f"our plugin is loaded, and speaks protocol {plugin.protocol} instead of {orders.PROTOCOL}",
            fix="the same weightsync in the engine's environment as here",
        )
    fix = PLUGIN_HINT if profile.plugins else "SGLang 0.5.12 or later"
    return Finding(
        level="warn",
        what="our plugin is not loaded: pickles, whole tensors only, and a failed load ends the server",
        fix=fix,
    )


def _memory(facts: ServerFacts) -> Finding:
    if not facts.enable_memory_saver:
        return Finding(level="ok", what="its memory cannot be released (no --enable-memory-saver)")
    if facts.plugin is None:
        return Finding(
            level="warn",
            what="--enable-memory-saver, and only our plugin could tell whether its weights are released",
            fix="our plugin, or wake the server before every push",
        )
    asleep = ", ".join(facts.plugin.asleep)
    return Finding(level="ok", what=f"released memory: {asleep or 'none'}")


def _loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
