"""Exchanges with a real engine, recorded once and replayed in unit tests.

    EngineHttp(spec, client=Through(Recorder(path, httpx.AsyncHTTPTransport())))    # with the real server; then .save()
    EngineHttp(spec, client=Through(Replay(path)))                                  # without

A replay answers requests in the recorded order. It fails on a request that differs from the next one in method, path,
query or body. Values that differ in every run are compared by kind only: payloads in base64, socket names, descriptors,
and the seconds that are left of a deadline.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from weightsync.adapters.connection import HttpClient, HttpResponse

if TYPE_CHECKING:
    from collections.abc import Mapping

URL = "http://engine"
FIXTURES = Path(__file__).parent / "fixtures" / "engines"
_OPAQUE = re.compile(r"[A-Za-z0-9+/_=-]{64,}|ipc://\S+")


def _known(content: bytes) -> Any:
    try:
        return json.loads(content) if content else None
    except ValueError:
        return content.decode("utf-8", "replace")


def settled(value: Any) -> Any:
    """Return `value` with everything that differs from run to run replaced by its kind."""
    match value:
        case dict():
            return {key: "<seconds>" if key == "seconds" else settled(item) for key, item in value.items()}
        case list():
            return [settled(item) for item in value]
        case str():
            return _OPAQUE.sub(lambda found: "<ipc>" if found[0].startswith("ipc") else "<bytes>", value)
    return value


class Through(HttpClient):
    """Sends requests through a transport of httpx instead of over a network."""

    def __init__(self, transport: httpx.AsyncBaseTransport, url: str = URL) -> None:
        super().__init__(url, {})
        self._url, self._transport = url, transport

    async def request(
        self, method: str, path: str, body: bytes = b"", *, headers: Mapping[str, str] | None = None
    ) -> HttpResponse:
        asked = httpx.Request(method, f"{self._url}{path}", content=body, headers=headers)
        response = await self._transport.handle_async_request(asked)
        return HttpResponse(response.status_code, await response.aread())


class Recorder(httpx.AsyncBaseTransport):
    """Forwards to `inner` and records; `save` writes the fixture. Headers, and so keys, are not written."""

    def __init__(self, path: Path, inner: httpx.AsyncBaseTransport, **about: str) -> None:
        self.path = path
        self.inner = inner
        self.about = about  # which engine, version, flags
        self.exchanges: list[dict[str, Any]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self.inner.handle_async_request(request)
        content = await response.aread()
        self.exchanges.append(
            {
                "method": request.method,
                "path": request.url.path,
                "query": dict(request.url.params),
                "body": settled(_known(await request.aread())),
                "status": response.status_code,
                "answer": _known(content),
            }
        )
        return httpx.Response(response.status_code, content=content)

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"about": self.about, "exchanges": self.exchanges}, indent=1) + "\n")


class Replay(httpx.AsyncBaseTransport):
    """Answers from a fixture. `rest()` returns the requests that have not come yet."""

    def __init__(self, path: Path) -> None:
        self._exchanges: list[dict[str, Any]] = json.loads(path.read_text())["exchanges"]
        self._next = 0

    def rest(self) -> list[tuple[str, str]]:
        return [(e["method"], e["path"]) for e in self._exchanges[self._next :]]

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert self._next < len(self._exchanges), f"{request.method} {request.url.path} was never asked"
        wanted = self._exchanges[self._next]
        asked = {
            "method": request.method,
            "path": request.url.path,
            "query": dict(request.url.params),
            "body": settled(_known(await request.aread())),
        }
        assert asked == {key: settled(wanted[key]) for key in asked}, f"exchange {self._next} differs"
        self._next += 1
        answer = wanted["answer"]
        if answer is None:
            return httpx.Response(wanted["status"])
        if isinstance(answer, str):
            return httpx.Response(wanted["status"], text=answer)
        return httpx.Response(wanted["status"], json=answer)
