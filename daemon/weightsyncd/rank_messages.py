"""Turns each message of a trainer rank in a push, from here or another node, into events for the session."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsync.errors import CodecError, RemoteProtocolError
from weightsync.session import events as ev
from weightsync.wire import messages as msg
from weightsync.wire.codec import decode_untrusted

if TYPE_CHECKING:
    from weightsyncd.plans import Plans
    from weightsyncd.push import Push

__all__ = ["passed_on", "rank_said"]


def rank_said(push: Push, rank: int, message: msg.RankWords, plans: Plans) -> None:
    """Handle a message of a rank that takes part. Raises `CodecError` for a malformed layout."""
    match message:
        case msg.Describe():
            digest = plans.learn(message.layout, push.ranks.world)
            if digest != push.ranks[rank].layout:
                words = f"rank {rank} sent a layout whose digest differs from the one it announced"
                error = RemoteProtocolError(words, rank=rank)
                push.hear(ev.RankFailed(rank=rank, error=error.record()))
            else:
                push.hear(ev.LayoutReceived(rank=rank))
        case msg.Filled():
            push.weights.filled(rank, message)
        case msg.Exposed():
            push.weights.exposed(rank, message)
        case msg.Measured():
            push.weights.measured(rank, message)
        case msg.Failed():
            push.hear(ev.RankFailed(rank=rank, error=message.error))
        case msg.Stopped():
            push.hear(ev.RankStopped(rank=rank))


def passed_on(push: Push, node: str, message: msg.RankSays, plans: Plans) -> None:
    """Handle a message that another node's daemon passed on from a rank there, or its word that the rank is lost."""
    if message.lost:
        if push.ranks.is_on(message.rank, node):
            push.hear(ev.RankLost(rank=message.rank, reason=message.lost))
        return
    try:
        words = decode_untrusted(message.body)
        if isinstance(words, msg.Open) and words.rank == message.rank:
            push.open(b"", words, node)
        elif isinstance(words, msg.RankWords):
            if push.ranks.is_on(message.rank, node) and push.ranks[message.rank].number == words.id:
                rank_said(push, message.rank, words, plans)
        else:
            raise CodecError(f"no rank says {type(words).__name__}")
    except CodecError as error:
        wrong = RemoteProtocolError(f"node {node} passed on what cannot be read: {error.message}", rank=message.rank)
        push.hear(ev.RankFailed(rank=message.rank, error=wrong.record()))
