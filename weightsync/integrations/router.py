"""Gives SGLang's router those of weightsyncd's engines that answer and serve the latest version, and no others.

The router's API, as run with sglang_router 0.3.2: `GET /workers` lists `{"workers": [{"id", "url", "is_healthy", …}]}`.
`POST /workers` with `{"url", "worker_type"}` and `DELETE /workers/{id}` answer 202 before anything is done, and may
then fail silently: a worker that does not answer is accepted and never listed. So this module waits until the list
shows the change.
"""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx

from weightsync.errors import EngineError, RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from weightsync.wire.messages import EngineStatus

__all__ = ["Router", "up_to_date"]

logger = logging.getLogger(__name__)

_LOOK = 0.1  # seconds between looks at whether the router has made a change


def up_to_date(engines: Iterable[EngineStatus]) -> list[EngineStatus]:
    """Return the engines that serve the highest version that any serves. An engine without a push is not among them."""
    serving = [e for e in engines if e.state == "serving" and e.version is not None]
    latest = max((e.version for e in serving if e.version is not None), default=None)
    return [e for e in serving if e.version == latest]


class Router:
    """One SGLang router, over HTTP."""

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 30.0) -> None:
        """timeout: seconds for each change to take effect."""
        self.url = url.rstrip("/")
        self._timeout = timeout
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def workers(self) -> dict[str, str]:
        """Return the router's workers: url → id. Raises `RemoteProtocolError` for an answer that is not a router's."""
        answer = self._ask("GET", "/workers")
        try:
            return {str(w["url"]).rstrip("/"): str(w["id"]) for w in answer["workers"]}
        except (KeyError, TypeError) as error:
            raise RemoteProtocolError(
                f"{self.url}/workers answered {str(answer)[:200]!r}", hint="a router of sglang_router >= 0.3"
            ) from error

    def show(self, engines: Iterable[EngineStatus]) -> None:
        """Have the router pass requests to those of `engines` that are up to date and answer, and not to the others.

        The others are removed first. Workers that are not among `engines` stay as they are. Raises `EngineError` at the
        end, naming each engine for which this failed.
        """
        engines = list(engines)
        wanted = [e for e in up_to_date(engines) if self._answers(e)]
        urls = {e.url.rstrip("/") for e in wanted}
        has = self.workers()
        problems = [f"{e.name} is up to date and does not answer" for e in up_to_date(engines) if e not in wanted]
        for engine in engines:
            url = engine.url.rstrip("/")
            if url not in has or url in urls:
                continue
            if problem := self._change("DELETE", f"/workers/{has[url]}", None, partial(self._lists, url, False)):
                problems.append(
                    f"{engine.name} is {engine.state} at version {engine.version} and still there: {problem}"
                )
            else:
                logger.warning("[engine=%s] router.removed: %s, version %s", engine.name, engine.state, engine.version)
        for engine in wanted:
            url = engine.url.rstrip("/")
            if url in has:
                continue
            body = {"url": url, "worker_type": "regular"}
            if problem := self._change("POST", "/workers", body, partial(self._lists, url, True)):
                problems.append(f"{engine.name} is up to date and not taken: {problem}")
            else:
                logger.info("[engine=%s] router.added at version %s", engine.name, engine.version)
        if problems:
            raise EngineError(
                f"router {self.url}: {'; '.join(problems)}",
                hint="an engine's /health, /server_info and /model_info must answer the router",
            )

    def _lists(self, url: str, wanted: bool) -> bool:
        """Whether the router lists the worker if it is `wanted`, and does not list it otherwise."""
        return (url in self.workers()) is wanted

    def _answers(self, engine: EngineStatus) -> bool:
        try:
            return httpx.get(f"{engine.url.rstrip('/')}/health", timeout=self._timeout, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    def _change(self, method: str, path: str, body: Any, done: Callable[[], bool]) -> str:
        """Ask for a change and wait until it is `done`. Returns what went wrong, or ""."""
        deadline = time.monotonic() + self._timeout
        never = threading.Event()
        try:
            self._ask(method, path, body)
            while not done():
                if time.monotonic() > deadline:
                    return f"not done within {self._timeout:g} s"
                never.wait(_LOOK)
        except RemoteProtocolError as error:
            return error.message
        return ""

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        try:
            url, limit = f"{self.url}{path}", self._timeout
            answer = httpx.request(method, url, json=body, headers=self._headers, timeout=limit, trust_env=False)
            answer.raise_for_status()
            return answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise RemoteProtocolError(
                f"{method} {self.url}{path} failed: {error}", hint="is this the address of SGLang's router?"
            ) from error
