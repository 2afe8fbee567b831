"""The HTTP face against clients that behave and clients that do not, and the adapter against servers that do not."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from tests.hand_push import connected, manifest_of, soon
from tests.unit.test_reference_engine_state import CONFIG, EMPTY, TENSORS, WHOLE, Workers
from weightsync.adapters import adapter
from weightsync.adapters.reference.commands import Command, Fingerprints, Reply, Residents
from weightsync.adapters.reference.control import ReferenceAdapter
from weightsync.adapters.reference.engine import Engine
from weightsync.adapters.reference.faults import Faults
from weightsync.adapters.reference.server import EngineServer, _Handler
from weightsync.errors import ConfigError, EngineError, EngineLost, EngineRefused
from weightsync.plan.residents import ResidentBoxes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from weightsync.adapters.base import EngineAdapter

KEY = "a-secret-key"


class Served:
    """A server in a thread, over fake workers; `kind`, `name`, `url` and `api_key` make it an engine's spec."""

    kind, name = "reference", "engine-a"
    ca_file, path, gpus, target = None, "auto", (), "all"  # what other brands' adapters ask for

    def __init__(self, api_key: str | None, faults: bool) -> None:
        self.workers = Workers()
        self.engine = Engine(CONFIG, self.workers, name="e", blank=False, on_lost=lambda: None)  # type: ignore[arg-type]
        self.server = EngineServer(("127.0.0.1", 0), self.engine, api_key=api_key, faults=Faults() if faults else None)
        self.api_key = api_key
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body=body, headers=headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def raw(self, data: bytes) -> bytes:
        """What comes back for these bytes, until the server hangs up."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as end:
            end.sendall(data)
            answer = b""
            while part := end.recv(65536):
                answer += part
            return answer


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    started: list[tuple[Served, threading.Thread]] = []

    def start(api_key: str | None = None, *, faults: bool = False) -> Served:
        served = Served(api_key, faults)
        thread = threading.Thread(target=served.server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        started.append((served, thread))
        return served

    yield start
    for served, thread in started:
        served.server.shutdown()
        thread.join(timeout=20)
        served.server.server_close()


def test_endpoints(serve: Callable[..., Served]) -> None:
    served = serve()
    assert served.ask("GET", "/health") == (200, {"status": "ok"})
    status, info = served.ask("GET", "/info")
    assert status == 200
    assert info["kind"] == "reference"
    assert info["software"].startswith("weightsync-reference ")
    assert (info["tp_size"], info["weight_version"], info["torn"], info["paused"]) == (2, None, False, False)
    digest = WHOLE.digest.hex()
    assert served.ask("PUT", f"/manifest/{digest}", WHOLE.pack()) == (200, {"untouched": [], "untouched_count": 0})
    status, body = served.ask("PUT", f"/manifest/{EMPTY.digest.hex()}", EMPTY.pack())
    assert (status, body["untouched_count"]) == (200, len(TENSORS))
    assert served.ask("POST", "/pause", b'{"mode": "keep"}') == (200, {})
    order = {"version": 1, "manifest": digest, "offers": [["YQ=="], []]}
    assert served.ask("POST", "/begin", json.dumps(order).encode()) == (200, {})
    assert served.ask("POST", "/resume")[0] == 409
    assert served.ask("POST", "/load", b'{"bucket": 0, "tickets": ["YQ==", "YQ=="]}') == (200, {})
    assert served.ask("POST", "/finish", b'{"version": 1}') == (200, {})
    assert served.ask("POST", "/resume", b"{}") == (200, {})
    status, body = served.ask("POST", "/generate", b'{"prompt_ids": [1, 2], "max_tokens": 2}')
    assert (status, body) == (200, {"token_ids": [1, 1], "finish_reason": "length", "weight_version": 1})
    assert served.ask("POST", "/generate", b'{"prompt_ids": [1], "max_tokens": 1, "logprobs": true}')[1]["logprobs"]
    assert served.ask("GET", "/checksums") == (200, ["", ""])


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/nowhere", None, 404),
        ("POST", "/info", b"", 404),
        ("GET", "/", None, 404),
        ("POST", "/pause", b"{", 400),
        ("POST", "/pause", b'{"mode": "sleep"}', 400),
        ("POST", "/pause", b'{"mode": "keep", "mode": 7}', 400),
        ("POST", "/load", b'{"bucket": -1, "tickets": []}', 400),
        ("POST", "/load", b'{"bucket": 0, "tickets": ["not base64"]}', 400),
        ("POST", "/finish", b'{"version": 1.5}', 400),
        ("POST", "/finish", b'{"version": 99999999999999999999}', 400),
        ("POST", "/begin", b'{"version": 1, "manifest": "zz", "offers": [[], []]}', 400),
        ("PUT", "/manifest/abc", b"", 400),
        ("PUT", f"/manifest/{'0' * 32}", b"\xff" * 100, 400),
        ("POST", "/generate", b'{"prompt_ids": [99]}', 400),
        ("POST", "/faults", b"{}", 404),
    ],
)
def test_what_makes_no_sense_is_answered(
    serve: Callable[..., Served], method: str, path: str, body: bytes | None, status: int
) -> None:
    answer = serve().ask(method, path, body)
    assert answer[0] == status, answer
    assert answer[1]["error"]


def test_bodies_are_bounded_before_they_are_read(serve: Callable[..., Served]) -> None:
    served = serve()
    head = b"POST /load HTTP/1.1\r\nHost: x\r\n"
    assert served.raw(head + b"Content-Length: 99999999999\r\n\r\n").startswith(b"HTTP/1.1 413 ")
    assert served.raw(head + b"Content-Length: 1e3\r\n\r\n").startswith(b"HTTP/1.1 411 ")
    assert served.raw(head + b"Transfer-Encoding: chunked\r\n\r\n").startswith(b"HTTP/1.1 411 ")
    assert served.raw(head + b"X-Timeout-Seconds: soon\r\nContent-Length: 2\r\n\r\n{}").startswith(b"HTTP/1.1 400 ")
    assert served.raw(b"\x16\x03\x01\x02\x00\r\n\r\n").startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 ", b"<!DOCTYPE"))
    assert served.ask("GET", "/health")[0] == 200


def test_an_unread_body_never_becomes_the_next_request(serve: Callable[..., Served]) -> None:
    served = serve(KEY)
    inner = b"GET /health HTTP/1.1\r\n\r\n"
    answer = served.raw(b"POST /load HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(inner) + inner)
    assert answer.count(b"HTTP/1.1") == 1
    assert b"401" in answer


def test_a_key_is_demanded(serve: Callable[..., Served]) -> None:
    served = serve(KEY)
    assert served.ask("GET", "/info")[0] == 401
    for wrong in ("Bearer wrong", KEY, "Bearer \xe9", ""):
        status, body = served.ask("GET", "/info", Authorization=wrong)
        assert status == 401
        assert KEY not in str(body)
    assert served.ask("GET", "/info", Authorization=f"Bearer {KEY}")[0] == 200


def test_faults_to_order(serve: Callable[..., Served]) -> None:
    served = serve(faults=True)

    def order(**fault: object) -> int:
        return served.ask("POST", "/faults", json.dumps(fault).encode())[0]

    assert order(fail={"endpoint": "/health", "status": 500, "times": 2, "after": 1}) == 200
    assert [served.ask("GET", "/health")[0] for _ in range(4)] == [200, 500, 500, 200]
    assert order(fail={"endpoint": "/load"}) == 200
    digest = WHOLE.digest.hex()
    served.ask("PUT", f"/manifest/{digest}", WHOLE.pack())
    served.ask("POST", "/begin", json.dumps({"version": 1, "manifest": digest, "offers": [[], []]}).encode())
    assert served.ask("POST", "/load", b'{"bucket": 0, "tickets": ["", ""]}')[0] == 500
    assert served.engine.torn
    assert served.engine.paused
    assert order(delay={"endpoint": "/health", "seconds": 600, "times": 9}) == 200
    answers: list[int] = []
    held = threading.Thread(target=lambda: answers.append(served.ask("GET", "/health")[0]))
    held.start()
    faults = served.server.faults
    assert faults is not None
    while faults._orders[0][1] == 0:
        pass
    assert order(clear=True) == 200
    held.join(timeout=20)
    assert answers == [200]
    assert order(fail={"endpoint": "/health", "status": 99}) == 400


SUMS = np.arange(len(WHOLE.tensors), dtype=np.uint64) + 2**63  # what every rank shows


def shown(rank: int, command: Command) -> Reply:
    """Both ranks hold all of every tensor."""
    if isinstance(command, Residents):
        table = WHOLE.tensors
        boxes = [(i, (0,) * len(shape), shape) for i, shape in enumerate(table.shapes)]
        return Reply(data=ResidentBoxes.of(boxes, table.width).pack())
    return Reply(data=SUMS.astype("<u8").tobytes() if isinstance(command, Fingerprints) else b"")


def test_the_adapter_takes_an_engine_through_pushes(serve: Callable[..., Served]) -> None:
    served = serve(KEY)
    served.workers.reply = shown

    async def push(hands: EngineAdapter, version: int) -> None:
        info = await hands.probe(deadline=soon())
        assert (info.tp_size, info.transport) == (2, "mapped")
        assert await hands.accept(WHOLE, deadline=soon()) == ()
        await hands.pause("keep", deadline=soon())
        await hands.begin(version, WHOLE, [[b"\x00\xff"], []], deadline=soon())
        assert (await hands.probe(deadline=soon())).torn
        await hands.load(0, [b"\x00\xff", b""], deadline=soon())
        await hands.finish(version, deadline=soon())
        assert await hands.verify(WHOLE, SUMS, deadline=soon()) == len(WHOLE.tensors)
        await hands.resume(deadline=soon())
        info = await hands.probe(deadline=soon())
        assert (info.version, info.paused, info.torn) == (version, False, False)

    async def pushes() -> None:
        async with connected(served) as hands:
            await push(hands, 1)
            await push(hands, 2)
            assert served.workers.commands.count(Residents(WHOLE.digest)) == 1  # they are the same at every push
            served.engine.incarnation = "another"
            await push(hands, 3)
            assert served.workers.commands.count(Residents(WHOLE.digest)) == 2
            name = WHOLE.tensors.names[5]
            with pytest.raises(EngineError, match=f"'{name}' in the engine differs"):
                await hands.verify(WHOLE, SUMS + (np.arange(len(SUMS)) >= 5), deadline=soon())

    asyncio.run(pushes())


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "none of a reference engine"),
        (b"[]", "none of a reference engine"),
        (msgspec.msgpack.encode(["text", "text"]), "none of a reference engine"),
        (msgspec.msgpack.encode([b""]), "1 ranks say what they hold, not 2"),
        (msgspec.msgpack.encode([b"", b""]), "makes no sense: not a packed residents"),
        (msgspec.msgpack.encode([ResidentBoxes.of([(99, (0,), (1,))], 2).pack()] * 2), "makes no sense.*not there"),
        (msgspec.msgpack.encode([ResidentBoxes.of([(0, (0, 0), (1, 1))], 2).pack()] * 2), "hold 1 of the 40 elements"),
    ],
)
def test_residents_that_make_no_sense(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, answer: bytes, words: str
) -> None:
    served = serve()
    monkeypatch.setitem(_Handler._ROUTES, ("GET", "/residents"), lambda *_: answer)

    async def fail() -> None:
        async with connected(served) as hands:
            with pytest.raises(EngineError, match=words):
                await hands.accept(WHOLE, deadline=soon())

    asyncio.run(fail())


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"\xc1", "none of a reference engine"),
        (msgspec.msgpack.encode([b"", b"", b""]), "3 of the engine's 2 ranks answered"),
        (msgspec.msgpack.encode([SUMS.tobytes(), SUMS.tobytes()[1:]]), "tp rank 1 holds .* boxes and sent"),
        (msgspec.msgpack.encode([SUMS.tobytes(), SUMS[::-1].tobytes()]), "tp ranks 0 and 1 hold different bytes"),
    ],
)
def test_fingerprints_that_make_no_sense(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, answer: bytes, words: str
) -> None:
    served = serve()
    served.workers.reply = shown
    monkeypatch.setitem(_Handler._ROUTES, ("GET", "/fingerprints"), lambda *_: answer)

    async def fail() -> None:
        async with connected(served) as hands:
            with pytest.raises(EngineError, match=words):
                await hands.verify(WHOLE, SUMS, deadline=soon())

    asyncio.run(fail())


def test_the_adapter_says_who_failed_and_how(serve: Callable[..., Served]) -> None:
    served = serve()
    wrong = manifest_of({name: ("float16", shape, b"") for name, (_, shape, _) in TENSORS.items()}, slot_bytes=1 << 16)

    async def fail() -> None:
        async with connected(served) as hands:
            with pytest.raises(EngineRefused, match=rf"dtype float16.*; and {len(TENSORS) - 5} more") as refused:
                await hands.accept(wrong, deadline=soon())
            assert (refused.value.engine, refused.value.phase) == ("engine-a", "accept")
            with pytest.raises(EngineError, match="begin first") as failed:
                await hands.load(0, [b"", b""], deadline=soon())
            assert failed.value.phase == "load"
            assert not isinstance(failed.value, EngineLost | EngineRefused)
            with pytest.raises(EngineLost, match=r"no answer to GET /info in 0\.0 s"):
                await hands.probe(deadline=soon(-1))

    asyncio.run(fail())


def test_a_manifest_that_the_engine_forgot_is_shown_again(serve: Callable[..., Served]) -> None:
    served = serve()
    served.workers.reply = shown

    async def push() -> None:
        async with connected(served) as hands:
            await hands.begin(1, WHOLE, [[], []], deadline=soon())
            assert (await hands.probe(deadline=soon())).torn

    asyncio.run(push())


def test_a_connection_in_use_is_not_kept_by_a_client_that_was_closed(serve: Callable[..., Served]) -> None:
    served = serve()

    async def calls() -> None:
        async with connected(served) as hands:
            assert isinstance(hands, ReferenceAdapter)
            client = hands._http
            asked = asyncio.create_task(client.request("GET", "/status"))
            await asyncio.sleep(0)  # it is under way
            await client.close()
            await asked
            assert client._idle == []

    asyncio.run(calls())


def test_connections_are_kept_and_made_anew_when_the_engine_was_restarted(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    made: list[object] = []
    process = served.server.process_request

    def counted(*arguments: Any) -> None:
        made.append(arguments)
        process(*arguments)

    monkeypatch.setattr(served.server, "process_request", counted)

    async def calls() -> None:
        async with connected(served) as hands:
            for _ in range(5):
                await hands.probe(deadline=soon())
            assert len(made) == 1
            await asyncio.gather(*(hands.probe(deadline=soon()) for _ in range(3)))
            assert len(made) == 3
            assert isinstance(hands, ReferenceAdapter)
            for idle, _ in hands._http._idle:  # as if the engine had hung up
                idle.reader.feed_eof()
            await hands.probe(deadline=soon())
            assert len(made) == 4

    asyncio.run(calls())


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", EngineLost),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{}", EngineLost),
        (b"SSH-2.0-OpenSSH\r\n\r\n", EngineError),
        (b"HTTP/1.1 200 OK\r\n\r\n{}", EngineError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", EngineError),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000, EngineError),
        (b"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://elsewhere/\r\nContent-Length: 0\r\n\r\n", EngineError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n<html></>", EngineError),
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 9\r\n\r\n<html></>", EngineError),
        (b"HTTP/1.1 504 Gateway Timeout\r\nContent-Length: 2\r\n\r\n{}", EngineLost),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}", EngineError),
    ],
)
def test_the_adapter_survives_whatever_answers(answer: bytes, error: type[EngineError]) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async def ask() -> None:
        async with (
            _listening(handle) as port,
            connected(
                SimpleNamespace(kind="reference", name="e", url=f"http://127.0.0.1:{port}", api_key=KEY)
            ) as hands,
        ):
            with pytest.raises(error) as raised:
                await hands.probe(deadline=soon(5))
            assert isinstance(raised.value, EngineLost) == (error is EngineLost)
            assert raised.value.engine == "e"
            assert KEY not in f"{raised.value} {raised.value!r} {hands!r}"

    asyncio.run(ask())


class _listening:
    """A server for the length of a block; gives its port."""

    def __init__(self, handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]) -> None:
        self._handle = handle
        self._ended: list[asyncio.Event] = []

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ended = asyncio.Event()
        self._ended.append(ended)
        try:
            await self._handle(reader, writer)
            await writer.wait_closed()
        except ConnectionError:
            pass  # the adapter hung up first
        finally:
            ended.set()

    async def __aenter__(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        async with asyncio.timeout(20):
            for ended in self._ended:
                await ended.wait()


def test_an_engine_that_does_not_answer_is_lost_at_the_deadline() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def ask() -> None:
        async with (
            _listening(silent) as port,
            connected(
                SimpleNamespace(kind="reference", name="e", url=f"http://127.0.0.1:{port}", api_key=None)
            ) as hands,
        ):
            with pytest.raises(EngineLost, match="no answer to POST /pause"):
                await hands.pause("keep", deadline=soon(0.05))

    asyncio.run(ask())


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:80", "ftp://host", "http://", "http://host:port", "http://u:p@host", "http://h/\r\nX: y"]
)
def test_urls_that_cannot_be_are_config_errors(url: str) -> None:
    with pytest.raises(ConfigError, match="'e'"):
        adapter(SimpleNamespace(kind="reference", name="e", url=url, api_key=None))


def test_a_key_that_cannot_be_sent_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError) as raised:
        adapter(SimpleNamespace(kind="reference", name="e", url="http://h", api_key="sec\r\nret"))
    assert "sec" not in str(raised.value)


def test_an_unknown_kind_of_engine() -> None:
    with pytest.raises(ConfigError, match="'abacus'") as raised:
        adapter(SimpleNamespace(kind="abacus", name="e", url="http://h", api_key=None))
    assert raised.value.hint == "one of: reference, sglang, vllm"
