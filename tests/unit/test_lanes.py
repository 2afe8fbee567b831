"""Which commands of a bridge wait for which."""

from __future__ import annotations

import threading
import time
from typing import NoReturn

import pytest

from weightsync.ipc.arena import Arena
from weightsync.nccl_bridge import commands as c
from weightsync.nccl_bridge import frames, service
from weightsync.nccl_bridge.process import Lanes
from weightsync.nccl_bridge.service import BridgeService
from weightsync.testing import eventually


class Bridge:
    """The lanes of one, and what was answered by them."""

    def __init__(self, arena: Arena) -> None:
        self.answers: dict[int, frames.Response] = {}
        self._lanes = Lanes(BridgeService("n/0", "x", arena), self._answer, self._stop)

    def _answer(self, response: frames.Response) -> None:
        self.answers[response.id] = response

    @staticmethod
    def _stop() -> NoReturn:
        raise AssertionError("nobody stops it")

    def ask(self, number: int, command: c.AnyCommand) -> None:
        self._lanes.take(frames.Request(id=number, timeout=20, command=command))

    def answered(self, number: int) -> bool:
        return eventually(lambda: number in self.answers, seconds=5)


@pytest.fixture
def bridge(tmp_path):
    with Arena.create(node="lanes", bridge=0, slots=1, slot_bytes=4096, directory=str(tmp_path)) as arena:
        yield Bridge(arena)


def test_a_bridge_that_still_loads_leaves_at_once(bridge, monkeypatch):
    """Else it is taken for wedged: it has seconds to leave, and a cold `import torch` may take longer."""
    loads, goes_on = threading.Event(), threading.Event()

    def load() -> None:
        loads.set()
        goes_on.wait(20)

    monkeypatch.setattr(service, "load", load)
    bridge.ask(1, c.Warm())
    assert loads.wait(5)
    since = time.monotonic()
    try:
        bridge.ask(2, c.Leave())
        assert bridge.answered(2)
        assert time.monotonic() - since < 3
        assert 1 not in bridge.answers
    finally:
        goes_on.set()
    assert bridge.answered(1)
    assert {number: answer.reply for number, answer in bridge.answers.items()} == {1: c.Done(), 2: c.Done()}
