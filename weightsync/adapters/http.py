"""HTTP to a vLLM or SGLang server: every call has a deadline, carries the engine's key, and fails with our errors.

    http = EngineHttp(spec)
    info = await http.get("/server_info", deadline=...)          # decoded JSON
    await http.post("/pause", {"mode": "abort"}, deadline=...)

An unsuccessful answer raises `EngineAnswer` (an `EngineError`) with the status and the engine's own reason; no answer
at all raises `EngineLost`. The key is sent as a bearer token and is in no message, log or repr. The node config refuses
a key for a plain http URL beyond loopback.
"""

from __future__ import annotations

import asyncio
import ssl
from http import HTTPStatus
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar, overload
from urllib.parse import urlencode

import msgspec

from weightsync.adapters.connection import HttpClient
from weightsync.errors import ConfigError, EngineError, EngineLost, RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from weightsync.adapters import EngineSpec

__all__ = ["EngineAnswer", "EngineHttp", "at_once"]

_A = TypeVar("_A")
_B = TypeVar("_B")
_C = TypeVar("_C")

_REASON = 600  # characters of an engine's reason that are worth repeating


class EngineAnswer(EngineError):
    """An unsuccessful answer: `status` is the HTTP status, `reason` the engine's own words."""

    def __init__(self, call: str, status: int, reason: str, *, engine: str, phase: str | None = None) -> None:
        super().__init__(f"{call} answered {status}: {reason}", engine=engine, phase=phase)
        self.status = status
        self.reason = reason


class EngineHttp:
    """JSON over HTTP to one engine, from one asyncio loop; calls may overlap."""

    def __init__(self, spec: EngineSpec, *, client: HttpClient | None = None) -> None:
        """Check the URL, key and certificates without connecting. `client` replaces the network in tests.

        Raises `ConfigError` for a URL, key or certificate file that cannot be used.
        """
        self.engine = spec.name
        self.url = spec.url.rstrip("/")
        key = spec.api_key
        if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
            raise ConfigError(
                f"the key of engine {spec.name!r} has characters that no header may have", engine=spec.name
            )
        headers = {"Accept": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        try:
            self._client = client or HttpClient(self.url, headers, tls=_tls(spec))
        except ValueError as error:
            raise ConfigError(
                f"engine {spec.name!r} cannot be reached by {spec.url!r}: {error}",
                engine=spec.name,
                hint="a URL such as http://127.0.0.1:8000 or https://[::1]:8000",
            ) from error

    def __repr__(self) -> str:
        return f"EngineHttp({self.engine!r}, {self.url!r})"

    async def get(self, path: str, params: dict[str, Any] | None = None, *, deadline: float) -> Any:
        """GET and return the decoded JSON, the text of an answer that is not JSON, or None for an empty one.

        Raises `EngineLost` or `EngineAnswer`.
        """
        return await self.call("GET", path, params=params, deadline=deadline)

    async def post(self, path: str, body: Any = None, params: dict[str, Any] | None = None, *, deadline: float) -> Any:
        """POST `body` as JSON, or no body if it is None; otherwise like `get`."""
        return await self.call("POST", path, body=body, params=params, deadline=deadline)

    async def has(self, method: str, path: str, *, deadline: float) -> bool:
        """Whether the route exists. Asks with a method that the route does not take, so that nothing runs.

        An unknown path answers 404, a known one 405. Only needed where /openapi.json is switched off.
        """
        probe = "GET" if method == "POST" else "DELETE"
        status, _ = await self._send(probe, path, None, None, deadline)
        return status != HTTPStatus.NOT_FOUND

    async def call(
        self, method: str, path: str, *, body: Any = None, params: dict[str, Any] | None = None, deadline: float
    ) -> Any:
        """Send one request and return its answer as `get` does."""
        status, content = await self._send(method, path, body, params, deadline)
        what = f"{method} {path}"
        if not 200 <= status < 300:
            raise EngineAnswer(what, status, _reason(content), engine=self.engine)
        if not content:
            return None
        try:
            return msgspec.json.decode(content)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return content.decode("utf-8", "replace")  # such as "Cache flushed.\n"

    async def close(self) -> None:
        """Drop all connections."""
        await self._client.close()

    async def _send(
        self, method: str, path: str, body: Any, params: dict[str, Any] | None, deadline: float
    ) -> tuple[int, bytes]:
        left = max(deadline - monotonic(), 0.0)
        content = b"" if body is None else msgspec.json.encode(body)
        headers = None if body is None else {"Content-Type": "application/json"}
        what, target = f"{method} {path}", f"{path}?{urlencode(params)}" if params else path
        try:
            async with asyncio.timeout(left):
                return await self._client.request(method, target, content, headers=headers)
        except TimeoutError as error:
            raise EngineLost(f"no answer to {what} in {left:.1f} s", engine=self.engine) from error
        except (OSError, EOFError, UnicodeError, RemoteProtocolError) as error:
            why = "the connection was closed" if isinstance(error, EOFError) else str(error) or type(error).__name__
            raise EngineLost(f"{what} at {self.url}: {why}", engine=self.engine, hint=_hint(why)) from error


@overload
async def at_once(one: Awaitable[_A], other: Awaitable[_B], /) -> tuple[_A, _B]: ...
@overload
async def at_once(one: Awaitable[_A], other: Awaitable[_B], third: Awaitable[_C], /) -> tuple[_A, _B, _C]: ...
async def at_once(*questions: Awaitable[Any]) -> tuple[Any, ...]:
    """Await independent questions at once and return their answers. If one fails, the others are cancelled."""
    asked = [asyncio.ensure_future(question) for question in questions]
    try:
        return tuple(await asyncio.gather(*asked))
    finally:
        for question in asked:
            question.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


def _tls(spec: EngineSpec) -> ssl.SSLContext | None:
    if spec.ca_file is None:
        return None
    try:
        return ssl.create_default_context(cafile=spec.ca_file)
    except OSError as error:
        raise ConfigError(
            f"engine {spec.name!r}: the certificates in ca_file = {spec.ca_file!r} cannot be used: {error}",
            engine=spec.name,
            hint="a PEM file with the certificate of the engine's authority, or of the engine itself",
        ) from error


def _hint(why: str) -> str | None:
    if "CERTIFICATE_VERIFY_FAILED" in why:
        return "name the engine's certificate in ca_file"
    if "record layer failure" in why or "WRONG_VERSION_NUMBER" in why:
        return "the engine speaks plain HTTP: its URL begins with http://"
    return None


def _reason(content: bytes) -> str:
    """Return the engine's reason, out of the error formats of vLLM, SGLang and FastAPI."""
    text = content.decode("utf-8", "replace").strip()
    try:
        found: Any = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        found = None
    for key in ("error", "message", "detail"):
        while isinstance(found, dict) and key in found:
            found = found[key]
    reason = found if isinstance(found, str) else text
    return (reason[: _REASON - 1] + "…" if len(reason) > _REASON else reason) or "no reason given"
