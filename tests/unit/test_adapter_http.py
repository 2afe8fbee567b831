"""The client for engines somebody else wrote, against real sockets."""

from __future__ import annotations

import asyncio
import gc
import http.server
import json
import socket
import ssl
import subprocess
import threading
import time
import warnings
from contextlib import contextmanager, suppress
from functools import wraps

import pytest

from weightsync.adapters.http import EngineAnswer, EngineHttp, at_once
from weightsync.config import EngineConfig
from weightsync.errors import ConfigError, EngineLost

KEY = "s3cret-key"


def on_loop(test):
    @wraps(test)
    def run(*args, **kwargs):
        asyncio.run(test(*args, **kwargs))

    return run


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        seen = {"path": self.path, "auth": self.headers.get("Authorization"), "body": body.decode()}
        routes = {
            "/echo": (200, json.dumps(seen)),
            "/plain": (200, "Cache flushed.\n"),
            "/empty": (200, ""),
            "/vllm-error": (500, json.dumps({"error": {"message": "no such method", "type": "x"}})),
            "/sglang-error": (400, json.dumps({"success": False, "message": "dp_size must be 1"})),
            "/fastapi-error": (422, json.dumps({"detail": "field required"})),
            "/long-error": (500, "x" * 5000),
            "/redirect": (307, ""),
        }
        if self.path.startswith("/slow"):
            self.server.release.wait(20)  # type: ignore[attr-defined]
        status, text = routes.get(self.path.partition("?")[0], (404, json.dumps({"detail": "Not Found"})))
        self.send_response(status)
        if status == 307:
            self.send_header("Location", "http://127.0.0.1:1/")
        self.send_header("Content-Length", str(len(text)))
        with suppress(BrokenPipeError):  # who asked has given up
            self.end_headers()
            self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


class V6Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6


@contextmanager
def serving(kind=http.server.ThreadingHTTPServer, host="127.0.0.1", context=None):
    server = kind((host, 0), Handler)
    server.release = threading.Event()
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.release.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def port():
    with serving() as found:
        yield found


def spec(url, **more):
    return EngineConfig(name="e", kind="vllm", url=url, **more)


def soon():
    return time.monotonic() + 10


@on_loop
async def test_the_key_goes_along_and_is_shown_nowhere(port, monkeypatch):
    monkeypatch.setenv("E_KEY", KEY)
    http = EngineHttp(spec(f"http://127.0.0.1:{port}/", api_key_env="E_KEY"))
    seen = await http.post("/echo", {"a": [1, None]}, {"mode": "keep"}, deadline=soon())
    assert seen == {"path": "/echo?mode=keep", "auth": f"Bearer {KEY}", "body": '{"a":[1,null]}'}
    assert KEY not in repr(http)
    await http.close()


@on_loop
async def test_answers_of_every_shape(port):
    http = EngineHttp(spec(f"http://127.0.0.1:{port}"))
    assert await http.get("/plain", deadline=soon()) == "Cache flushed.\n"
    assert await http.get("/empty", deadline=soon()) is None
    for path, status, reason in (
        ("/vllm-error", 500, "no such method"),
        ("/sglang-error", 400, "dp_size must be 1"),
        ("/fastapi-error", 422, "field required"),
        ("/nowhere", 404, "Not Found"),
        ("/redirect", 307, "no reason given"),
    ):
        with pytest.raises(EngineAnswer) as caught:
            await http.post(path, {}, deadline=soon())
        assert (caught.value.status, caught.value.reason, caught.value.engine) == (status, reason, "e")
    with pytest.raises(EngineAnswer) as caught:
        await http.get("/long-error", deadline=soon())
    assert len(caught.value.reason) == 600
    assert await http.has("POST", "/echo", deadline=soon())
    assert not await http.has("POST", "/nowhere", deadline=soon())
    await http.close()


@on_loop
async def test_no_answer_in_time_is_a_lost_engine(port):
    http = EngineHttp(spec(f"http://127.0.0.1:{port}"))
    with pytest.raises(EngineLost, match=r"no answer to GET /slow in 0\.2 s"):
        await http.get("/slow", deadline=time.monotonic() + 0.2)
    with pytest.raises(EngineLost, match=r"in 0\.0 s"):
        await http.get("/echo", deadline=time.monotonic() - 1)
    await http.close()


@on_loop
async def test_questions_asked_at_once_are_answered_in_their_order():
    later = asyncio.get_running_loop().create_future()

    async def first():
        return await later

    async def second():
        later.set_result(1)
        return 2

    assert await at_once(first(), second()) == (1, 2)


@on_loop
async def test_nobody_waits_for_the_others_when_one_question_fails():
    given_up = asyncio.Event()

    async def never():
        try:
            await asyncio.Event().wait()
        finally:
            given_up.set()

    async def fails():
        raise EngineLost("gone")

    with pytest.raises(EngineLost):
        await at_once(never(), fails(), never())
    await asyncio.wait_for(given_up.wait(), 5)


@on_loop
async def test_nobody_there_is_a_lost_engine():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        http = EngineHttp(spec(f"http://127.0.0.1:{taken.getsockname()[1]}"))
        with pytest.raises(EngineLost, match=r"GET /echo at http://127\.0\.0\.1"):
            await http.get("/echo", deadline=soon())
        await http.close()


@on_loop
async def test_ipv6():
    try:
        with serving(V6Server, "::1") as port:
            http = EngineHttp(spec(f"http://[::1]:{port}"))
            assert (await http.get("/echo", deadline=soon()))["path"] == "/echo"
            await http.close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    where = tmp_path_factory.mktemp("tls")
    files = ("-keyout", where / "key.pem", "-out", where / "cert.pem")
    kind = ("-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost")
    names = ("-addext", "subjectAltName=IP:127.0.0.1")
    subprocess.run(("openssl", "req", "-x509", *kind, *names, *files), check=True, capture_output=True, timeout=30)
    return where


@on_loop
async def test_tls_is_verified_against_the_file_that_is_named(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    with serving(context=context) as port:
        trusted = EngineHttp(spec(f"https://127.0.0.1:{port}", ca_file=str(certificate / "cert.pem")))
        assert (await trusted.get("/echo", deadline=soon()))["path"] == "/echo"
        await trusted.close()
        strict = EngineHttp(spec(f"https://127.0.0.1:{port}"))
        with pytest.raises(EngineLost, match="ca_file"):
            await strict.get("/echo", deadline=soon())
        await strict.close()


@on_loop
async def test_https_to_a_plain_server_says_so(port):
    http = EngineHttp(spec(f"https://127.0.0.1:{port}"))
    with pytest.raises(EngineLost, match="http://"):
        await http.get("/echo", deadline=soon())
    await http.close()


async def answering(answers, ask):
    """Have a server answer each request with the next of `answers`. Returns what `ask(http)` does, and connections."""
    made = []

    async def handle(reader, writer):
        made.append(writer)
        try:
            while answers:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(answers.pop(0))
            await reader.read()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        http = EngineHttp(spec(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
        found = await ask(http)
        await http.close()
    return found, len(made)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n[1,\r\n2;x=y\r\n2]\r\n0\r\nT: 1\r\n\r\n", [1, 2]),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: CHUNKED\r\n\r\n0\r\n\r\n", None),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", []),
        (b"HTTP/1.1 204 No Content\r\n\r\n", None),
        (b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n", None),
    ],
)
@on_loop
async def test_answers_as_servers_and_proxies_frame_them(answer, found):
    async def ask(http):
        return [await http.get("/", deadline=soon()) for _ in range(2)]

    assert await answering([answer] * 2, ask) == ([found] * 2, 1)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "chunk of b'zz' bytes"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffff\r\n", "chunk of b'fffffffff' bytes"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n", "does not end where it says"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 100_000, "a line of more than"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "without a usable Content-Length"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", "encoded as b'gzip, chunked'"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "no HTTP/1.1"),
    ],
)
@on_loop
async def test_what_is_no_answer_is_a_lost_engine(answer, words):
    async def ask(http):
        with pytest.raises(EngineLost, match=words):
            await http.get("/", deadline=soon())

    await answering([answer], ask)


DROPPED = {
    "it failed": b"HTTP/1.1 500 X\r\n",
    "it refused": b"HTTP/1.1 400 X\r\n",
    "it is old": b"HTTP/1.0 200 OK\r\n",
    "it says so": b"HTTP/1.1 200 OK\r\nConnection: close\r\n",
    "it says so among others": b"HTTP/1.1 200 OK\r\nConnection: X-Hop, Close\r\n",
    "it says so once": b"HTTP/1.1 200 OK\r\nConnection: close\r\nConnection: X-Hop\r\n",
}


@pytest.mark.parametrize("reason", [*DROPPED, "it was idle"])
@on_loop
async def test_a_connection_that_may_be_dropped_is_not_used_again(monkeypatch, reason):
    """uvicorn drops it after an error, or once it was idle, without saying so: the next call would look like a loss."""
    head = DROPPED.get(reason, b"HTTP/1.1 200 OK\r\n")
    monkeypatch.setattr("weightsync.adapters.connection._IDLE", 0.0 if reason == "it was idle" else 1e9)

    async def ask(http):
        with suppress(EngineAnswer):
            await http.get("/", deadline=soon())
        return await http.get("/", deadline=soon())

    first = head + b"Content-Length: 0\r\n\r\n"
    assert await answering([first, b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n7"], ask) == (7, 2)


@on_loop
async def test_a_connection_is_idle_from_when_it_was_asked(monkeypatch, port):
    """This loop may have been blocked since the answer, which the server may have dropped meanwhile."""
    monkeypatch.setattr("weightsync.adapters.connection._IDLE", 0.05)
    http = EngineHttp(spec(f"http://127.0.0.1:{port}"))
    asked = asyncio.create_task(http.get("/echo", deadline=soon()))
    await asyncio.sleep(0)
    while not asked.done():
        time.sleep(0.06)  # noqa: ASYNC251 - what blocks a loop
        await asyncio.sleep(0)
    connections = http._client._idle
    (before,) = [one.writer for one, _ in connections]
    await http.get("/echo", deadline=soon())
    assert [one.writer for one, _ in connections] != [before]
    await http.close()


@on_loop
async def test_what_nobody_asked_for_is_no_answer():
    """Such as a proxy's 408 on an idle connection, or a body that is longer than it says."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n"

    async def ask(http):
        return [await http.get("/", deadline=soon()) for _ in range(3)]

    answers = [answer + b"1" + answer + b"9", answer + b"2", answer + b"3"]
    assert await answering(answers, ask) == ([1, 2, 3], 2)


@on_loop
async def test_what_is_too_late_is_not_sent():
    async def ask(http):
        await http.post("/first", deadline=soon())  # its connection is kept
        with pytest.raises(EngineLost, match=r"in 0\.0 s"):
            await http.post("/late", deadline=time.monotonic() - 1)
        await asyncio.sleep(0.05)

    answers = [b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"] * 2
    await answering(answers, ask)
    assert len(answers) == 1


def test_nothing_is_left_open_over_tls(certificate):
    """A connection is dropped after an error, without a word from its peer."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    with serving(context=context) as port, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", ResourceWarning)

        async def ask():
            http = EngineHttp(spec(f"https://127.0.0.1:{port}", ca_file=str(certificate / "cert.pem")))
            with pytest.raises(EngineAnswer):
                await http.get("/nowhere", deadline=soon())
            await http.get("/echo", deadline=soon())
            with pytest.raises(EngineAnswer):
                await http.get("/vllm-error", deadline=soon())
            await http.close()

        asyncio.run(ask())
        gc.collect()
    assert [str(one.message) for one in warned if "transport" in str(one.message)] == []


def test_what_cannot_be_used_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="cannot be reached"):
        EngineHttp(spec("ftp://x"))
    with pytest.raises(ConfigError, match="ca_file"):
        EngineHttp(spec("https://127.0.0.1:1", ca_file=str(tmp_path / "missing.pem")))
    monkeypatch.setenv("E_KEY", "two\nlines")
    with pytest.raises(ConfigError, match="characters") as caught:
        EngineHttp(spec("http://127.0.0.1:1", api_key_env="E_KEY"))
    assert "two" not in str(caught.value)
