"""A connection between two daemons is reset, and both live, as when a firewall forgets it."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.conftest import populated
from tests.faults.kit import ARENA, TIMEOUTS, Node
from tests.own import free_port, named
from weightsync.fleet import Fleet

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.faults, pytest.mark.slow]


class Proxy:
    """What stands between the two."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listening.getsockname()[1]}"
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._port))
                except OSError:  # it is not there yet
                    near.close()
                    continue
                self._ends += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    @staticmethod
    def _pump(one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)

    def reset(self) -> None:
        """Break every connection that goes through it."""
        while self._ends:
            end = self._ends.pop()
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.reset()


@pytest.fixture(scope="module")
def _apart() -> Iterator[tuple[Node, Proxy]]:
    with Fleet() as fleet:
        engines, trainer = populated(fleet, home=1, away=1)
        port = free_port()
        proxy = Proxy(port)
        # a push that noticed nothing would wait for as long as an operation takes
        terms: dict[str, Any] = {
            "arena": ARENA,
            "timeouts": {**TIMEOUTS, "operation": 25, "liveness": 8},
            "log": {"level": "debug"},
        }
        cluster = {"listen": f"tcp://127.0.0.1:{port}"}
        away = fleet.start_daemon(named("reset1"), engines[1:], cluster=cluster, **terms)
        home = fleet.start_daemon(named("reset0"), engines[:1], peers={away.name: proxy.endpoint}, **terms)
        node = Node(fleet, home, engines, trainer, [away])
        node.wait_attached()
        yield node, proxy
        proxy.close()
        assert "Traceback" not in home.log.read_text() + away.log.read_text()


@pytest.fixture
def apart(_apart) -> Iterator[tuple[Node, Proxy]]:
    yield _apart
    node, _ = _apart
    while node.ranks:
        node.ranks.pop().close()


def push(node: Node, **terms):
    (rank,) = node.start_ranks(1)
    return rank.push(**node.terms(0, 1, version=node.next_version(), timeout=60, **terms))


def outcomes(report):
    return {engine["engine"]: engine["outcome"] for engine in report["engines"]}


@pytest.mark.parametrize("read", [0, 9])
def test_in_a_push(apart, read):
    """The node is lost to it, at once, and takes part in the next."""
    node, proxy = apart
    rank = push(node, gate=["read", read])
    rank.wait_at("read")
    since = node.log_length()
    proxy.reset()
    node.wait_log(f"[node={node.others[0].name}] lost: its connection broke", since=since)
    rank.go()
    report = rank.report()
    assert outcomes(report) == {"home": "committed", "away": "lost"}
    assert report["seconds"] < 25
    node.wait_attached()
    assert push(node).report()["complete"]


def test_between_pushes(apart):
    """One that begins at the same moment misses nobody."""
    node, proxy = apart
    proxy.reset()
    assert push(node).report()["complete"]
