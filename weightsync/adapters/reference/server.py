"""The engine's HTTP face: requests in, JSON or MessagePack out, one thread a connection. No torch.

    GET  /health                  200 while the engine lives
    GET  /info                    what it is and how it stands
    PUT  /manifest/{digest hex}   body: a packed manifest → what it leaves alone, or 400 with `problems`
    POST /pause                   {"mode": "keep" | "wait" | "abort" | "none"}
    POST /begin                   {"version", "manifest": digest hex, "offers": [[base64, …] per rank]}
    POST /load                    {"bucket", "tickets": [base64 per rank]}
    POST /draw                    body: exposures, packed or by digest, instead of buckets → {"why_not": "" if it could}
    POST /places                  {"known": [base64 digest, …]}, instead of buckets → per rank, where others may write,
                                  as packed `Shown` (MessagePack: bins)
    POST /finish                  {"version"}
    GET  /residents/{digest hex}  per rank, which boxes of an accepted manifest's tensors it holds (MessagePack: bins)
    GET  /fingerprints/{digest hex}   per rank, 8 bytes for each of these boxes as it is now (MessagePack: bins)
    POST /resume                  409 when torn
    POST /generate                {"prompt_ids", "max_tokens", "logprobs", "seed"}; without a seed, greedy
    GET  /checksums               per rank, xxh3 over its parameters
    POST /faults                  only with --enable-faults (see faults.py)

A failure is answered with {"error": sentence, …} and 4xx or 5xx. A client says in `X-Timeout-Seconds` how long it
waits, and the engine gives up when that time is over. If a key is set, every request needs `Authorization: Bearer KEY`.
"""

from __future__ import annotations

import hmac
import logging
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

import msgspec

from weightsync import __version__
from weightsync.adapters.base import PauseMode
from weightsync.adapters.reference.faults import FaultOrder, Faults
from weightsync.adapters.reference.gate import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightsync.adapters.reference.engine import Engine

__all__ = ["EngineServer"]

logger = logging.getLogger(__name__)

_MAX_JSON = 16 << 20  # bytes
_MAX_MANIFEST = 256 << 20
_MAX_UNTOUCHED = 32  # names shown
_MAX_PROBLEMS = 1000
_DEFAULT_SECONDS = 60.0
_MAX_SECONDS = 3600.0
_MAX_VERSION = (1 << 63) - 1

_Version = Annotated[int, msgspec.Meta(ge=0, le=_MAX_VERSION)]
_Body = TypeVar("_Body")


class _Pause(msgspec.Struct, frozen=True):
    mode: PauseMode


class _Begin(msgspec.Struct, frozen=True):
    version: _Version
    manifest: str
    offers: list[list[bytes]]


class _Load(msgspec.Struct, frozen=True):
    bucket: Annotated[int, msgspec.Meta(ge=0)]
    tickets: list[bytes]


class _Places(msgspec.Struct, frozen=True):
    known: list[bytes]


class _Finish(msgspec.Struct, frozen=True):
    version: _Version


class _Generate(msgspec.Struct, frozen=True):
    prompt_ids: list[int]
    max_tokens: int = 16
    logprobs: bool = False
    seed: int | None = None


class EngineServer(ThreadingHTTPServer):
    """Listens from construction on; `serve_forever` answers."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], engine: Engine, *, api_key: str | None, faults: Faults | None) -> None:
        self.engine = engine
        self.api_key = None if api_key is None else f"Bearer {api_key}".encode()
        self.faults = faults
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log the error; the base class would print it."""
        logger.debug("connection from %s failed: %r", client_address, sys.exception())


class _Handler(BaseHTTPRequestHandler):
    server: EngineServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 600  # seconds that a connection may idle
    body_left = False  # the request has a body that was not read
    content_type = "application/json"

    def do_GET(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *arguments: Any) -> None:
        logger.debug(format, *arguments)

    def _answer(self) -> None:
        self.body_left = self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers
        self.content_type = "application/json"
        try:
            status, body = HTTPStatus.OK, self._dispatch()
        except RequestError as error:
            status, body = error.status, msgspec.json.encode(error.body)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
            return
        except Exception as error:  # the seam: the client learns that the request failed, the log has the traceback
            logger.exception("%s %s.failed", self.command, self.path)
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            body = msgspec.json.encode({"error": f"{type(error).__name__}: {error}"})
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {self.content_type}\r\n"
            f"Content-Length: {len(body)}"
        )
        if self.body_left:  # an unread body would be taken for the next request
            self.close_connection = True
            head += "\r\nConnection: close"
        self.wfile.write(f"{head}\r\n\r\n".encode() + body)  # one write: headers alone would cost a packet

    def _dispatch(self) -> bytes:
        key = self.server.api_key
        if key is not None and not hmac.compare_digest(self.headers.get("Authorization", "").encode(), key):
            raise RequestError(HTTPStatus.UNAUTHORIZED, "a bearer key is needed")
        path = self.path.partition("?")[0]
        slash = path.find("/", 1)
        endpoint, rest = (path, "") if slash < 0 else (path[:slash], path[slash + 1 :])
        route = self._ROUTES.get((self.command, endpoint))
        if route is None:
            raise RequestError(HTTPStatus.NOT_FOUND, f"no such endpoint: {self.command} {endpoint}")
        deadline = self._deadline()
        faults = self.server.faults
        if faults is not None and endpoint != "/faults" and (status := faults.meet(endpoint)) is not None:
            if (
                endpoint in ("/begin", "/load", "/draw", "/places", "/finish")
                and status >= HTTPStatus.INTERNAL_SERVER_ERROR
            ):
                self.server.engine.break_update("an injected fault", deadline=deadline)
            raise RequestError(HTTPStatus(status), "an injected fault")
        return route(self, rest, deadline)

    def _deadline(self) -> float:
        text = self.headers.get("X-Timeout-Seconds")
        try:
            seconds = _DEFAULT_SECONDS if text is None else float(text)
        except ValueError as error:
            raise RequestError(HTTPStatus.BAD_REQUEST, "X-Timeout-Seconds: a number of seconds") from error
        if not 0 <= seconds <= _MAX_SECONDS:
            raise RequestError(HTTPStatus.BAD_REQUEST, f"X-Timeout-Seconds: 0 to {_MAX_SECONDS:.0f}")
        return monotonic() + seconds

    def _body(self, limit: int) -> bytes:
        text = self.headers.get("Content-Length", "")
        if not text.isascii() or not text.isdigit() or "Transfer-Encoding" in self.headers:
            raise RequestError(HTTPStatus.LENGTH_REQUIRED, "a Content-Length is needed")
        size = int(text[:20])
        if size > limit:
            raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {limit} bytes")
        data = self.rfile.read(size)
        if len(data) != size:
            raise ConnectionError("the client left in the middle of a request")
        self.body_left = False
        return data

    def _json(self, kind: type[_Body]) -> _Body:
        try:
            return msgspec.json.decode(self._body(_MAX_JSON), type=kind)
        except msgspec.DecodeError as error:
            raise RequestError(HTTPStatus.BAD_REQUEST, str(error)) from error

    def _health(self, _rest: str, _deadline: float) -> bytes:
        return b'{"status":"ok"}'

    def _info(self, _rest: str, _deadline: float) -> bytes:
        return msgspec.json.encode({"software": f"weightsync-reference {__version__}", **self.server.engine.info()})

    def _manifest(self, rest: str, deadline: float) -> bytes:
        verdict = self.server.engine.accept(_digest(rest), self._body(_MAX_MANIFEST), deadline=deadline)
        if verdict.problems:
            count = len(verdict.problems)
            raise RequestError(
                HTTPStatus.BAD_REQUEST,
                f"{count} tensors cannot be taken" if count > 1 else verdict.problems[0],
                problems=verdict.problems[:_MAX_PROBLEMS],
                problem_count=count,
            )
        names = verdict.untouched
        return msgspec.json.encode({"untouched": names[:_MAX_UNTOUCHED], "untouched_count": len(names)})

    def _pause(self, _rest: str, deadline: float) -> bytes:
        self.server.engine.pause(self._json(_Pause).mode, deadline=deadline)
        return b"{}"

    def _begin(self, _rest: str, deadline: float) -> bytes:
        body = self._json(_Begin)
        self.server.engine.begin(body.version, _digest(body.manifest), body.offers, deadline=deadline)
        return b"{}"

    def _load(self, _rest: str, deadline: float) -> bytes:
        body = self._json(_Load)
        self.server.engine.load(body.bucket, body.tickets, deadline=deadline)
        return b"{}"

    def _draw(self, _rest: str, deadline: float) -> bytes:
        why_not = self.server.engine.draw(self._body(_MAX_MANIFEST), deadline=deadline)
        return msgspec.json.encode({"why_not": why_not})

    def _places(self, _rest: str, deadline: float) -> bytes:
        return self._bins(self.server.engine.places(self._json(_Places).known, deadline=deadline))

    def _finish(self, _rest: str, deadline: float) -> bytes:
        self.server.engine.finish(self._json(_Finish).version, deadline=deadline)
        return b"{}"

    def _residents(self, rest: str, deadline: float) -> bytes:
        return self._bins(self.server.engine.residents(_digest(rest), deadline=deadline))

    def _fingerprints(self, rest: str, deadline: float) -> bytes:
        return self._bins(self.server.engine.fingerprints(_digest(rest), deadline=deadline))

    def _bins(self, ranks: list[bytes]) -> bytes:
        self.content_type = "application/msgpack"
        return msgspec.msgpack.encode(ranks)

    def _resume(self, _rest: str, deadline: float) -> bytes:
        if self.body_left:
            self._body(_MAX_JSON)
        self.server.engine.resume(deadline=deadline)
        return b"{}"

    def _generate(self, _rest: str, deadline: float) -> bytes:
        body = self._json(_Generate)
        done = self.server.engine.generate(body.prompt_ids, body.max_tokens, deadline=deadline, seed=body.seed)
        answer = done._asdict()
        if not body.logprobs:
            del answer["logprobs"]
        return msgspec.json.encode(answer)

    def _checksums(self, _rest: str, deadline: float) -> bytes:
        return msgspec.json.encode(self.server.engine.checksums(deadline=deadline))

    def _faults(self, _rest: str, _deadline: float) -> bytes:
        if self.server.faults is None:
            raise RequestError(HTTPStatus.NOT_FOUND, "faults are not enabled")
        self.server.faults.add(self._json(FaultOrder))
        return b"{}"

    _ROUTES: ClassVar[dict[tuple[str, str], Callable[[_Handler, str, float], bytes]]] = {
        ("GET", "/health"): _health,
        ("GET", "/info"): _info,
        ("PUT", "/manifest"): _manifest,
        ("POST", "/pause"): _pause,
        ("POST", "/begin"): _begin,
        ("POST", "/load"): _load,
        ("POST", "/draw"): _draw,
        ("POST", "/places"): _places,
        ("POST", "/finish"): _finish,
        ("GET", "/residents"): _residents,
        ("GET", "/fingerprints"): _fingerprints,
        ("POST", "/resume"): _resume,
        ("POST", "/generate"): _generate,
        ("GET", "/checksums"): _checksums,
        ("POST", "/faults"): _faults,
    }


def _digest(text: str) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except ValueError as error:
        raise RequestError(HTTPStatus.BAD_REQUEST, "a manifest's digest: 32 hex digits") from error
    if len(digest) != 16:
        raise RequestError(HTTPStatus.BAD_REQUEST, "a manifest's digest: 32 hex digits")
    return digest
