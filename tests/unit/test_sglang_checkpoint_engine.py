"""The path of checkpoint-engine's protocol, with a worker that does what the real one does and loads nothing."""

from __future__ import annotations

import asyncio
import io
import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import zmq

from tests.hand_push import soon
from tests.unit.test_sglang_adapter import MANIFEST, TICKET, Server, served
from weightsync.adapters.sglang.path_ipc import _abandoned
from weightsync.errors import EngineError, EngineLost
from weightsync.testing import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightsync.adapters.sglang.control import SGLangAdapter


class Worker(Server):
    """A server on a CPU whose worker unpickles with everything replaced by its name."""

    def __init__(self, fails_at: int | None = None, says: bytes = b"") -> None:
        super().__init__()
        self.met: list[Any] = []
        self.fails_at = fails_at  # the message at which the worker gives up, and the call with it
        self.says = says

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path != "/update_weights_from_ipc":
            return await super().handle_async_request(request)
        ((_, address),) = json.loads(await request.aread())["zmq_handles"].items()
        success = await asyncio.to_thread(self._serve, address)
        return httpx.Response(200 if success else 400, json={"success": success, "message": "it ended"})

    def _serve(self, address: str) -> bool:
        if self.fails_at == 0:
            return False
        with zmq.Context() as context, context.socket(zmq.REP) as socket:
            socket.setsockopt(zmq.LINGER, 1000)
            socket.setsockopt(zmq.RCVTIMEO, 10000)
            socket.connect(address)
            while True:
                message = socket.recv()
                self.met.append(_Names.read(message))
                if self.fails_at == len(self.met):
                    return False
                socket.send(self.says)
                if self.met[-1] is None:
                    return True


class _Names(pickle.Unpickler):
    """Opens nothing."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        class Made:
            def __init__(self, *args: Any) -> None:
                self.args = args

            def __setstate__(self, state: Any) -> None:
                pass

        Made.__name__ = f"{module}.{name}"
        return Made

    @classmethod
    def read(cls, message: bytes) -> Any:
        return cls(io.BytesIO(message)).load()


async def half(hand: SGLangAdapter) -> None:
    await hand.probe(deadline=soon())
    await hand.accept(MANIFEST, deadline=soon())
    await hand.pause("abort", deadline=soon())
    await hand.begin(2, MANIFEST, [[b""]], deadline=soon())
    for bucket in range(MANIFEST.buckets):
        await hand.load(bucket, [TICKET], deadline=soon(5))


def run(server: Worker) -> None:
    async def push() -> None:
        hand = served(server, path="ipc")
        try:
            await half(hand)
            await hand.finish(2, deadline=soon())
            assert server.weights == ">2"
            await hand.resume(deadline=soon())
        finally:
            await hand.close()

    asyncio.run(push())


def test_one_call_for_all_buckets_and_a_buffer_taken_back_after_each() -> None:
    server = Worker()
    run(server)
    kinds = [type(message).__name__ for message in server.met]
    assert kinds == ["tuple", "list", "tuple"] * MANIFEST.buckets + ["NoneType"]
    assert [item["name"] for item in server.met[1]] == [MANIFEST.tensors.names[0]]
    assert server.weights == "2"
    assert len(server.said("/flush_cache")) == 1


@pytest.mark.parametrize("at", [0, 1, 2, 4])
def test_a_worker_that_gives_up_ends_the_update(at: int) -> None:
    server = Worker(fails_at=at)
    with pytest.raises(EngineError, match="it ended") as failure:
        run(server)
    assert not isinstance(failure.value, EngineLost)
    assert server.weights == ">2"


def test_what_a_worker_answers_is_text() -> None:
    with pytest.raises(EngineError, match=r"worker of .* says: b'out of memory'"):
        run(Worker(says=b"out of memory"))


def test_a_push_that_is_given_up_tells_the_worker_so() -> None:
    async def give_up(server: Worker) -> None:
        hand = served(server, path="ipc")
        await half(hand)
        await hand.close()
        assert await asyncio.to_thread(eventually, lambda: server.met[-1] is None)

    server = Worker()
    asyncio.run(give_up(server))


def test_a_directory_that_has_just_gone_is_nobodys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    monkeypatch.setattr(Path, "glob", lambda *_: [gone])
    assert _abandoned("http://127.0.0.1:1") == []
