"""Relays buckets to other nodes: a bridge broadcasts a slot into slots of the other nodes' bridges."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from weightsync.errors import ErrorRecord, ProtocolError, TransportClosed, WeightSyncError
from weightsync.nccl_bridge import commands
from weightsync.session import events as ev
from weightsync.wire import messages as msg
from weightsyncd.exports import NodeExports
from weightsyncd.rails import MOMENT, quietly, sentences

if TYPE_CHECKING:
    from weightsync.session import instructions as do
    from weightsyncd.context import PushContext
    from weightsyncd.rails import Rails

__all__ = ["relay"]

logger = logging.getLogger(__name__)


async def relay(rails: Rails, context: PushContext, instruction: do.RelayBucket, sequence: int) -> ev.BucketRelayed:
    """Broadcast one bucket. Raises `TransportError` if this node's bridge cannot even export it.

    A failed broadcast breaks the communicator for every node. So it is formed again with the nodes that can be reached,
    and these get the bucket in a second broadcast.
    """
    targets = {target.node: target for target in instruction.targets}
    failed: dict[str, ErrorRecord] = {}
    now = time.monotonic()
    for until in (now + (instruction.deadline - now) / 2, instruction.deadline):
        errors: dict[str, ErrorRecord] = {}
        if not rails.stands(sorted(targets)):
            errors.update(await rails.form(sorted(targets), until))
        left = {node: target for node, target in targets.items() if node not in errors}
        if left:
            errors.update(await _broadcast(rails, context, instruction, left, sequence, until))
        failed.update(errors)
        for node in set(targets) - set(errors):
            failed.pop(node, None)
        if not errors:
            break
        logger.warning("[model=%s v=%d bucket=%d] relay.failed: %s", *context.at(instruction.bucket), sentences(errors))
        targets = {node: targets[node] for node in errors}
    reached = tuple(sorted({target.node for target in instruction.targets} - set(failed)))
    return ev.BucketRelayed(bucket=instruction.bucket, nodes=reached, failed=tuple(sorted(failed.items())))


async def _broadcast(
    rails: Rails,
    context: PushContext,
    instruction: do.RelayBucket,
    targets: dict[str, do.Slot],
    sequence: int,
    until: float,
) -> dict[str, ErrorRecord]:
    """Attempt the broadcast once. Returns the nodes that do not hold the bucket, and why."""
    bridge, generation = rails.bridges[instruction.slot.bridge], rails.generation
    readers = {node: f"{node}/{target.bridge}" for node, target in targets.items()}  # bridges are peers by name
    peers = tuple(sorted(readers.values()))
    slot, nbytes = instruction.slot.index, instruction.nbytes
    checksum = NodeExports.checksum_of(context, instruction.bucket, bridge)
    export = commands.Export(slot=slot, nbytes=nbytes, sequence=sequence, peers=peers, checksum=checksum)
    try:
        reply = await bridge.call(export, deadline=until)
    except (ProtocolError, TransportClosed) as error:  # it has restarted, or is leaving a broken communicator
        rails.break_up(generation)
        return dict.fromkeys(targets, error.record())
    failed: dict[str, ErrorRecord] = {}

    async def receive(node: str, target: do.Slot) -> None:
        question = msg.Receive(
            push=context.push,
            bucket=instruction.bucket,
            rail=target.bridge,
            slot=target.index,
            ticket=reply.peer_tickets[readers[node]],
            timeout=max(0.0, until - time.monotonic()),
        )
        try:
            await rails.peer(node).ask(question, until + MOMENT)
        except WeightSyncError as error:
            failed[node] = error.record()
            await rails.give_up(bridge, generation)

    async def send() -> ErrorRecord | None:
        problem = await quietly(bridge.call(commands.Send(slot=slot, sequence=sequence), deadline=until))
        if problem is not None and not failed:
            logger.warning(
                "[model=%s v=%d bucket=%d] send.failed: %s", *context.at(instruction.bucket), problem.message
            )
            await rails.give_up(bridge, generation)  # its own communicator may be whole, so that others still wait
        return problem

    async with asyncio.TaskGroup() as group:
        for node, target in targets.items():
            group.create_task(receive(node, target))
        mine = group.create_task(send())
    own = mine.result()
    if failed or own is not None:
        rails.break_up(generation)
    if own is not None and not failed:
        failed = dict.fromkeys(targets, own)
    return failed
