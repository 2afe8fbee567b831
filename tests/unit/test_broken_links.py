"""A connection between two daemons that breaks while both live: it is told at once, once, and made anew."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

import pytest

from tests.unit.test_keys import free_endpoint
from weightsync.config import parse_node_config
from weightsync.errors import DaemonLost, ProtocolError
from weightsync.session import events as ev
from weightsync.session import instructions as do
from weightsync.wire import messages as msg
from weightsync.wire.codec import plain
from weightsync.wire.daemon_links import ControlServer, PeerLink
from weightsyncd.context import PushContext
from weightsyncd.peers import Peer

if TYPE_CHECKING:
    from collections.abc import Callable

ATTACHED = msg.Attached(node="b", incarnation="x:y", engines=(), slots=(2,), slot_bytes=1 << 40, address="h")


class Far:
    """A daemon that attaches whoever asks and answers nothing else, behind a proxy whose connections are reset."""

    def __init__(self) -> None:
        self._server = ControlServer(free_endpoint(), "cluster.listen", tag=b"far")
        self._ends: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.asked: list[msg.Message] = []
        self.endpoint = ""
        self.hold_up: Callable[[int], bool] = lambda count: False  # by how many questions there were
        self.mute: Callable[[int], bool] = lambda count: False

    async def __aenter__(self) -> Far:
        self._server.bind()
        self._tasks.add(asyncio.create_task(self._serve()))
        self._proxy = await asyncio.start_server(self._pass_on, "127.0.0.1", 0)
        self.endpoint = f"tcp://127.0.0.1:{self._proxy.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.reset()
        self._proxy.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._server.close()

    async def _serve(self) -> None:
        async for identity, message in self._server.frames(lambda: None):
            self.asked.append(message)
            if self.hold_up(len(self.asked)):
                time.sleep(1.5)  # noqa: ASYNC251 - with the whole loop, and thus with who asks
            if isinstance(message, msg.Attach) and not self.mute(len(self.asked)):
                self._server.send(identity, _with_id(ATTACHED, message.id))

    def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def both() -> None:
            far_reader, far_writer = await asyncio.open_connection(*self._server.endpoint[len("tcp://") :].split(":"))
            self._ends += [writer, far_writer]
            await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))

        self._tasks.add(asyncio.create_task(both()))

    def reset(self) -> None:
        """Both ends of every connection are there, and the connection is not."""
        for end in self._ends:
            end.transport.abort()
        self._ends.clear()

    async def has_been_asked(self, kind: type[msg.Message]) -> None:
        await until(lambda: any(isinstance(message, kind) for message in self.asked))


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another task does in its own time."""
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it has not come to that")


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


def _with_id(message: msg.Message, number: int) -> msg.Message:
    return msg.Attached(**{name: getattr(message, name) for name in message.__struct_fields__} | {"id": number})


def execute(seconds: float) -> msg.Execute:
    return msg.Execute(push="p", model="m", version=1, instruction={}, timeout=seconds)


@pytest.mark.timeout(20)
def test_what_was_asked_over_a_connection_that_breaks_fails_at_once(no_leaks):
    """Its answer goes to who called from there, and nobody is there any more."""

    async def main() -> None:
        async with Far() as far:
            link = PeerLink(far.endpoint, patience=10.0)
            try:
                await link.ask(msg.Attach(node="a"), deadline=time.monotonic() + 10)
                asking = asyncio.create_task(link.ask(execute(15), deadline=time.monotonic() + 15))
                await far.has_been_asked(msg.Execute)
                since = time.monotonic()
                far.reset()
                with pytest.raises(DaemonLost, match=r"connection to the daemon at .* broke"):
                    await asking
                with pytest.raises(DaemonLost, match="broke"):  # nor is it to be asked again
                    await link.ask(execute(15), deadline=time.monotonic() + 15)
                assert time.monotonic() - since < 5
                assert link.broken.is_set()
            finally:
                await link.close()

    asyncio.run(main())


@pytest.mark.timeout(20)
def test_a_daemon_that_is_not_there_yet_breaks_nothing(no_leaks):
    async def main() -> None:
        async with Far() as far:
            before, far.endpoint = far.endpoint, free_endpoint()
            link = PeerLink(far.endpoint, patience=0.5)
            try:
                with pytest.raises(DaemonLost, match="did not answer Attach in time"):
                    await link.ask(msg.Attach(node="a"), deadline=time.monotonic() + 0.5)
                assert not link.broken.is_set()
            finally:
                far.endpoint = before
                await link.close()

    asyncio.run(main())


def made_peer(
    name: str, endpoint: str = "tcp://127.0.0.1:1", lost: list[str] | None = None, liveness: float = 50.0
) -> Peer:
    return Peer(
        name,
        endpoint,
        parse_node_config(f'[node]\nname = "a"\n[timeouts]\nliveness = {liveness}\n'),
        key=None,
        on_lost=lambda node, error: None if lost is None else lost.append(f"{node}: {error.message}"),
        on_rank=lambda node, said: None,
        on_free=lambda: None,
        taken=lambda node, names: None,
    )


@pytest.mark.parametrize(
    ("instruction", "event"),
    [
        (do.PauseEngine(engine="e", mode="keep", deadline=1), ev.EnginePaused(engine="other")),
        (do.RetireBridge(node="b", bridge=0, reason="", deadline=1), ev.EnginePaused(engine="e")),
    ],
)
def test_a_node_answers_for_the_engine_that_it_was_asked_of(instruction, event):
    """What another engine did is not the answer: the push would wait for the one that it has asked."""
    with pytest.raises(ProtocolError, match=f"asked for engine .* answered for '{event.engine}'"):
        made_peer("b")._event_of(msg.Executed(event=plain(event)), instruction, PushContext("p", "m", 1))


@pytest.mark.timeout(20)
def test_a_node_whose_connection_breaks_is_lost_once_and_attached_again(no_leaks):
    """Long before the next heartbeat."""

    async def main() -> list[str]:
        lost: list[str] = []
        async with Far() as far:
            peer = made_peer("b", far.endpoint, lost)
            keeping = asyncio.create_task(peer.keep())
            try:
                await until(lambda: peer.info is not None)
                asking = asyncio.create_task(peer.ask(execute(15), time.monotonic() + 15))
                await far.has_been_asked(msg.Execute)
                since = time.monotonic()
                far.reset()
                with pytest.raises(DaemonLost, match="broke"):
                    await asking
                await until(lambda: bool(lost))
                await until(lambda: peer.info is not None)
                assert time.monotonic() - since < 5
            finally:
                keeping.cancel()
                await asyncio.gather(keeping, return_exceptions=True)
        return lost

    assert asyncio.run(main()) == ["b: node b was lost: its connection broke"]


@pytest.mark.parametrize("then_silent", [False, True])
@pytest.mark.timeout(20)
def test_a_daemon_that_stands_still_itself_does_not_lose_a_node_for_that(no_leaks, then_silent):
    """It asks once more; a node that does not answer then, either, is lost."""

    async def main() -> list[str]:
        lost: list[str] = []
        async with Far() as far:
            far.hold_up = lambda count: count == 2
            if then_silent:
                far.mute = lambda count: count in (3, 4)
            peer = made_peer("b", far.endpoint, lost, liveness=1.0)
            keeping = asyncio.create_task(peer.keep())
            try:
                await until(lambda: len(far.asked) >= 5 and peer.info is not None)
            finally:
                keeping.cancel()
                await asyncio.gather(keeping, return_exceptions=True)
        return lost

    assert asyncio.run(main()) == (["b: node b was lost: it has not been heard for 1 s"] if then_silent else [])
