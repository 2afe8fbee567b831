"""Claims of nodes for a push that is to begin, and what others are told of a push that holds one."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.unit.test_rails import Recorder, following
from tests.unit.test_trainers import CALL, CONFIG
from weightsync.wire import messages as msg
from weightsync.wire.codec import decode_untrusted, encode
from weightsyncd.claims import Claims, is_refused
from weightsyncd.context import PushContext
from weightsyncd.held_push import HeldPush
from weightsyncd.waiting import Call

HOLDER = msg.Holder(node="n1", push="n1-a", group="another", model="policy", version=7)


def call(**changes: Any) -> Call:
    return Call(b"rank", msgspec.structs.replace(CALL, timeout=5.0, **changes), time.monotonic())


class FakePeer:
    """Answers a claim with what it is given, one after the other; the last for ever."""

    def __init__(self, *holders: msg.Holder | None) -> None:
        self.info, self.engines = object(), ()
        self.told: list[msg.Message] = []
        self.claims = 0
        self._holders = list(holders)

    async def refresh(self, claim: msg.Claim | None = None) -> Any:
        self.claims += 1
        holder = self._holders.pop(0) if len(self._holders) > 1 else self._holders[0]
        return SimpleNamespace(holder=holder, claimed=holder is None)

    def tell(self, message: msg.Message) -> None:
        self.told.append(message)


def made(peers: dict[str, FakePeer], **changes: Any) -> tuple[msg.Holder | None, Any]:
    """What is in the way of a claim of node "m"."""

    async def main() -> tuple[msg.Holder | None, Any]:
        config = msgspec.structs.replace(CONFIG, node=msgspec.structs.replace(CONFIG.node, name="m"))
        claims = Claims(config, peers, lambda: None)  # type: ignore[arg-type]
        claim = claims.new(call(**changes))
        holder = await claims.make(claim)
        claims.withdraw(claim)
        return holder, claim

    return asyncio.run(main())


def test_a_claim_that_nothing_is_in_the_way_of():
    peers = {"a": FakePeer(None), "z": FakePeer(None)}
    holder, claim = made(peers)
    assert holder is None
    assert claim.nodes == {"a", "z"}


def test_what_is_held_is_given_back():
    peers = {"a": FakePeer(None), "z": FakePeer(HOLDER)}
    holder, claim = made(peers)
    assert holder == HOLDER
    assert peers["a"].told == [msg.Release(push=claim.terms.push)]
    assert peers["z"].told == []


@pytest.mark.timeout(10)
def test_a_claim_from_a_later_node_is_waited_for_and_one_from_an_earlier_is_not():
    pending = msgspec.structs.replace(HOLDER, node="z", pending=True)
    peer = FakePeer(pending, pending, None)
    assert made({"x": peer})[0] is None
    assert peer.claims == 3
    first = msgspec.structs.replace(pending, node="a")
    assert made({"x": FakePeer(first)})[0] == first


@pytest.mark.parametrize(
    ("holder", "words", "refused"),
    [
        ({}, {}, True),
        ({"pending": True}, {}, True),
        ({"model": "other"}, {}, False),
        ({"group": CALL.group}, {}, False),
        ({"group": ""}, {}, False),
        ({"ending": True}, {}, False),
        ({"repeat": True}, {}, False),
        ({}, {"engines": ("e0",)}, False),
    ],
)
def test_what_a_call_is_refused_for(holder, words, refused):
    assert is_refused(call(**words), msgspec.structs.replace(HOLDER, **holder)) is refused


def test_a_push_that_holds_a_node_can_be_told_whatever_is_known_of_it():
    """One that began with a rank's call, by an instruction, or with something for a bridge."""
    for held in (HeldPush(b"i", PushContext("p", "", 0), 0.0), HeldPush(b"i", PushContext("p", "m", 1), 0.0, "n1")):
        answer = msg.Attached(
            node="b", incarnation="x", engines=(), slots=(2,), slot_bytes=1, address="h", holder=held.holder()
        )
        assert decode_untrusted(encode(answer)) == answer


CLAIM = msg.Claim(push="n2-a", group="one", model="policy", version=3)


@pytest.mark.timeout(10)
def test_who_has_claimed_a_node_in_vain_hears_when_it_is_free():
    async def main() -> list[tuple[bytes, msg.Message]]:
        sent: list[tuple[bytes, msg.Message]] = []
        follower = following(Recorder())
        follower._executor.engines = SimpleNamespace(of_model=lambda model: ["e0"], __iter__=lambda: iter(()))

        def send(identity: bytes, message: msg.Message) -> bool:
            sent.append((identity, message))
            return True

        follower._send = send
        assert (await follower._claim(b"two", "n2", CLAIM)).push == "p"
        await follower.release(b"identity", "p", None)
        follower.tell_free()
        follower.tell_free()
        assert await follower._claim(b"two", "n2", CLAIM) is None
        assert follower.holder == msg.Holder(
            node="n2", push="n2-a", group="one", model="policy", version=3, pending=True
        )
        assert await follower._claim(b"two", "n2", CLAIM) is None  # once more
        assert (await follower._claim(b"three", "n3", msgspec.structs.replace(CLAIM, push="n3-a"))).push == "n2-a"
        await follower.release(b"two", "n2-a", None)
        assert follower.following is None
        assert await follower._claim(b"two", "n2", CLAIM) is None
        assert follower.following is None, "a claim that was given back before it arrived holds nothing"
        return sent

    assert asyncio.run(main()) == [(b"two", msg.Free())]
