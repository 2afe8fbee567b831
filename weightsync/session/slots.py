"""Slots of bridges: leased in bucket order, and taken back when no process uses the bucket in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsync.session import instructions as do
from weightsync.session.tracks import Copy

if TYPE_CHECKING:
    from weightsync.session.state import PushState

__all__ = ["forget_arena", "free_slots", "grant", "lose_copy", "rank_writes_no_more", "slots_of"]


def grant(push: PushState) -> None:
    """Lease slots, in bucket order.

    If ranks of several nodes write, a bucket gets its slots on all nodes at once. Otherwise later buckets could hold
    all slots of a node for which an earlier bucket waits, and neither would go on.
    """
    nodes = sorted(push.nodes) if push.spread else [push.home]
    for owner, waiting in push.ungranted.items():
        free = [push.free.get((node, owner), []) for node in nodes]
        while waiting and all(free):
            index = waiting.popleft()
            bucket = push.buckets[index]
            bucket.unfilled = set(bucket.fillers)
            push.active.add(index)
            push.phases.start("fill", push.now)
            writers: dict[str, list[int]] = {}
            for rank in sorted(bucket.fillers):
                writers.setdefault(push.rank_nodes[rank], []).append(rank)
            for node, indices in zip(nodes, free, strict=True):
                slot = do.Slot(node, owner, indices.pop(0))
                bucket.copies[node] = Copy(slot)
                if node in writers:
                    push.issue(do.GrantLease(bucket=index, slot=slot, ranks=tuple(writers[node])))


def free_slots(push: PushState) -> None:
    """Take back the slot of each copy that is no longer written, sent or read."""
    remote = push.receivers()
    for index in list(push.active):
        bucket = push.buckets[index]
        for node, copy in list(bucket.copies.items()):
            idle = not (bucket.unfilled or copy.readers or copy.exporting or copy.relaying)
            served = copy.exported and (node != push.home or bucket.relayed or not remote)
            if idle and (served or push.ended):
                del bucket.copies[node]
                push.free.setdefault((node, copy.slot.bridge), []).append(copy.slot.index)
        if not bucket.copies:
            push.active.discard(index)


def lose_copy(push: PushState, index: int, node: str) -> None:
    """Forget the bucket's copy on a node: its arena is gone, or no more events about it will come."""
    copies = push.buckets[index].copies
    copy = copies.pop(node, None)
    if copy is not None and copy.exporting:
        push.phases.stop("export", push.now)
    if copy is not None and copy.relaying and not any(c.relaying for c in copies.values()):
        push.phases.stop("wire", push.now)


def forget_arena(push: PushState, node: str, bridge: int) -> None:
    """Forget the leases and exports in an arena that is gone. The arena that succeeds it is empty."""
    for index in push.active:
        bucket = push.buckets[index]
        copy = bucket.copies.get(node)
        if copy is not None and copy.slot.bridge == bridge:
            bucket.unfilled.difference_update(push.ranks_on(node))
            lose_copy(push, index, node)
    place = (node, bridge)
    if place in push.capacity:
        push.free[place] = list(range(push.capacity[place]))


def rank_writes_no_more(push: PushState, rank: int) -> None:
    """End the rank's part in every bucket that is leased to it."""
    for bucket in push.buckets:
        bucket.unfilled.discard(rank)


def slots_of(push: PushState, node: str) -> int:
    return sum(count for (where, _), count in push.capacity.items() if where == node)
