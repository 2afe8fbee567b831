"""Buckets that ranks of several nodes have written: the bridges of a rail give one another their parts."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from typing import TYPE_CHECKING

from weightsync.errors import ErrorRecord, WeightSyncError
from weightsync.nccl_bridge import commands
from weightsync.plan.shares import MemberPart
from weightsync.session import events as ev
from weightsync.wire import messages as msg
from weightsyncd.rails import MOMENT, quietly, sentences

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from weightsync.session import instructions as do
    from weightsyncd.context import PushContext
    from weightsyncd.rails import Rails

__all__ = ["exchange"]

logger = logging.getLogger(__name__)


async def exchange(
    rails: Rails, context: PushContext, instruction: do.ExchangeBucket, runs: Mapping[str, bytes]
) -> ev.BucketRelayed:
    """Have every node of the instruction's slots hold the whole bucket. `runs` maps each node to what its ranks wrote.

    A failed exchange breaks the communicator for every node. It is formed again, without the node that failed if that
    node wrote nothing, and the exchange is repeated: written parts still lie in the slots. No node holds the bucket if
    nodes that wrote parts, or home, fail twice.
    """
    slots = {slot.node: slot for slot in instruction.slots}
    failed: dict[str, ErrorRecord] = {}
    now = time.monotonic()
    until, again = now + (instruction.deadline - now) / 2, True
    while True:
        nodes = sorted(set(slots) - {rails.home})
        missing = {} if rails.stands(nodes) else await rails.form(nodes, until)
        failed.update(missing)
        slots = {node: slot for node, slot in slots.items() if node not in missing}
        if missing.keys() & runs.keys():
            return _relayed(instruction, (), failed)  # without its part no node can have the bucket
        if slots.keys() == {rails.home}:
            return _relayed(instruction, slots, failed)  # only home wrote, so it has the whole bucket
        broken = await _attempt(rails, context, instruction.bucket, slots, runs, until)
        where = context.at(instruction.bucket)
        if not broken:
            logger.debug("[model=%s v=%d bucket=%d] exchange.complete nodes=%d", *where, len(slots))
            return _relayed(instruction, slots, failed)
        logger.warning("[model=%s v=%d bucket=%d] exchange.failed: %s", *where, sentences(broken))
        needed = broken.keys() & {*runs, rails.home}
        if needed and not again:
            return _relayed(instruction, (), failed | broken)
        if time.monotonic() >= instruction.deadline:
            return _relayed(instruction, (), failed | broken | dict.fromkeys([rails.home], *broken.values()))
        again = again and not needed
        until = instruction.deadline
        for node in broken.keys() - needed:
            failed[node] = broken[node]
            del slots[node]


def _relayed(
    instruction: do.ExchangeBucket, nodes: Iterable[str], failed: Mapping[str, ErrorRecord]
) -> ev.BucketRelayed:
    return ev.BucketRelayed(bucket=instruction.bucket, nodes=tuple(sorted(nodes)), failed=tuple(sorted(failed.items())))


async def _attempt(
    rails: Rails,
    context: PushContext,
    bucket: int,
    slots: Mapping[str, do.Slot],
    runs: Mapping[str, bytes],
    until: float,
) -> dict[str, ErrorRecord]:
    """Attempt the exchange once. Returns the node that broke it, and its error; empty if all hold the bucket."""
    home, generation, token = rails.home, rails.generation, secrets.randbits(59)
    nodes = sorted(set(slots) - {home})
    ranks = {node: rank for rank, node in enumerate([home, *nodes])}  # in the communicator
    own = slots[home]
    bridge = rails.bridges[own.bridge]
    parts = tuple(MemberPart(root=ranks[node], runs=some) for node, some in sorted(runs.items()))
    broken: dict[str, ErrorRecord] = {}

    async def take_part(node: str) -> None:
        question = msg.Exchange(
            push=context.push,
            bucket=bucket,
            rail=slots[node].bridge,
            slot=slots[node].index,
            generation=generation,
            token=token,
            parts=parts,
            timeout=max(0.0, until - time.monotonic()),
            checksum=context.sums.get(bucket),
        )
        try:
            await rails.peer(node).ask(question, until + MOMENT)
        except WeightSyncError as error:
            if not broken:  # the others' errors follow from the first
                broken[node] = error.record()
                await rails.give_up(bridge, generation)

    async def take_part_here() -> None:
        command = commands.Exchange(slot=own.index, generation=generation, token=token, parts=parts)
        problem = await quietly(bridge.call(command, deadline=until))
        if problem is not None and not broken:
            broken[home] = problem
            await rails.give_up(bridge, generation)  # its own communicator may be whole, so that others still wait

    async with asyncio.TaskGroup() as group:
        for node in nodes:
            group.create_task(take_part(node))
        group.create_task(take_part_here())
    if broken:
        rails.break_up(generation)
    return broken
