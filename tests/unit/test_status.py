"""What a daemon answers an operator, of a node that is made up."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from tests.wire_examples import ERROR
from weightsync.config import parse_node_config
from weightsync.errors import TransportBroken
from weightsync.ipc.ledger import Account
from weightsync.nccl_bridge.commands import LedgerBooks
from weightsyncd.context import PushContext
from weightsyncd.status import status_of


class Engines(list[Any]):
    """None, and no keepers."""

    keepers: ClassVar[dict[str, Any]] = {}


class Bridge:
    """One that has been restarted, and is ready again or not."""

    name, config = "n0/0", SimpleNamespace(index=0, gpu="")

    def __init__(self, pid: int | None) -> None:
        self._pid = pid

    def status(self) -> SimpleNamespace:
        return SimpleNamespace(pid=self._pid, restarts=1, last_error=ERROR, state="ready" if self._pid else "lost")

    async def call(self, command: object, deadline: float) -> LedgerBooks:
        if self._pid is None:
            raise TransportBroken("bridge n0/0 is not ready")
        return LedgerBooks(accounts=(Account(reader="e0/0", exports=5, closes=4),))


def node(tmp_path, pid: int | None = 4712) -> Any:
    return SimpleNamespace(
        config=parse_node_config(f'[node]\nshm_dir = "{tmp_path}"'),
        started=time.monotonic(),
        bridges=[Bridge(pid)],
        engines=Engines(),
        peers={},
        executor=SimpleNamespace(exports=SimpleNamespace(leaks=0)),
        follower=SimpleNamespace(context=None),
        seeker=None,
        trainers=SimpleNamespace(
            push=None,
            last=None,
            last_error=None,
            last_at=None,
            newest={},
            refusals=SimpleNamespace(last=None, last_at=0.0),
            waiting=[],
        ),
    )


@pytest.mark.parametrize(("pid", "outstanding"), [(4712, 1), (None, 0)])
def test_a_bridge_that_is_back_still_says_why_it_was_restarted(tmp_path, pid, outstanding):
    (bridge,) = asyncio.run(status_of(node(tmp_path, pid))).bridges
    assert (bridge.error, bridge.pid, bridge.restarts, bridge.outstanding) == (ERROR.message, pid, 1, outstanding)


def test_what_the_node_follows_and_what_it_refused(tmp_path):
    server = node(tmp_path)
    before = asyncio.run(status_of(server))
    assert (before.follows, before.refused, before.refused_ago) == (None, None, None)
    server.follower.context = PushContext("n1-ab", "policy", 3, since=time.monotonic() - 7)
    server.trainers.refusals.last, server.trainers.refusals.last_at = ERROR, time.monotonic() - 9
    after = asyncio.run(status_of(server))
    assert after.follows is not None
    assert (after.follows.push, after.follows.model, after.follows.version) == ("n1-ab", "policy", 3)
    assert 7 <= after.follows.seconds < 60
    assert after.refused == ERROR
    assert after.refused_ago is not None
    assert 9 <= after.refused_ago < 60
