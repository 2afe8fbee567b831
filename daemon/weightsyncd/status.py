"""The answer to `weightsync status`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import time
from typing import TYPE_CHECKING

from weightsync import __version__
from weightsync.errors import TransportError
from weightsync.nccl_bridge import commands
from weightsync.wire import messages as msg

if TYPE_CHECKING:
    from weightsync.ipc.ledger import Account
    from weightsyncd.bridges import Bridge
    from weightsyncd.context import PushContext
    from weightsyncd.server import Server

__all__ = ["accounts_of", "slots_taken", "status_of"]

logger = logging.getLogger(__name__)

_GLANCE = 1.0  # seconds an operator waits for a bridge's ledger


async def accounts_of(bridge: Bridge, patience: float) -> tuple[Account, ...] | None:
    """Return the accounts in a bridge's ledger; None if it does not show them, which says nothing of their content.

    A bridge that does not show them within `patience` seconds is taken for wedged, and replaced.
    """
    try:
        books = await bridge.call(commands.Ledger(), deadline=time.monotonic() + patience)
    except TransportError as error:
        logger.debug("[bridge=%s] shows no ledger: %s", bridge.name, error.message)
        return None
    return books.accounts


async def status_of(server: Server, *, fresh: bool = False) -> msg.Status:
    """Return everything an operator asks for first. With `fresh`, peers are first asked for their engines anew."""
    config, trainers = server.config, server.trainers
    if fresh:
        await trainers.wind_up(time.monotonic() + config.timeouts.probe)
        with contextlib.suppress(TimeoutError):  # a peer that does not answer is shown as it was last seen
            async with asyncio.timeout(config.timeouts.probe):
                await server.see_peers()
    bridges = await asyncio.gather(*(_bridge(server, bridge) for bridge in server.bridges))
    remote = [e for peer in server.peers.values() for e in peer.engines]
    nodes = tuple(_peer(server, name) for name in server.peers)
    shm_free = None
    with contextlib.suppress(OSError):
        shm_free = shutil.disk_usage(config.node.shm_dir).free
    return msg.Status(
        node=config.node.name,
        software=f"weightsync {__version__}",
        pid=os.getpid(),
        uptime=time.monotonic() - server.started,
        engines=(*(e.status(config.node.name) for e in server.engines), *remote),
        bridges=tuple(bridges),
        peers={node.node: node.state for node in nodes},
        push=trainers.push.status() if trainers.push is not None else None,
        last=trainers.last,
        last_error=trainers.last_error,
        pushed=dict(trainers.newest),
        kept={model: keeper.version for model, keeper in server.engines.keepers.items() if keeper.version is not None},
        keepers=tuple(keeper.status() for keeper in server.engines.keepers.values()),
        nodes=nodes,
        device="cuda" if config.node.gpus else "cpu",
        shm_free=shm_free,
        leaks=server.executor.exports.leaks,
        last_ago=time.monotonic() - trainers.last_at if trainers.last_at is not None else None,
        refused=trainers.refusals.last,
        refused_ago=time.monotonic() - trainers.refusals.last_at if trainers.refusals.last is not None else None,
        follows=_followed(server.follower.context),
        waiting=len(trainers.waiting),
        seed=server.seeker.problem if server.seeker is not None else "",
    )


def _followed(context: PushContext | None) -> msg.FollowedPush | None:
    if context is None:
        return None
    seconds = time.monotonic() - context.since
    return msg.FollowedPush(push=context.push, model=context.model, version=context.version, seconds=seconds)


async def _bridge(server: Server, bridge: Bridge) -> msg.BridgeStatus:
    how, config = bridge.status(), server.config
    accounts: tuple[Account, ...] = ()
    with contextlib.suppress(TimeoutError):  # giving up here does not make the bridge wedged
        async with asyncio.timeout(_GLANCE):
            accounts = await accounts_of(bridge, config.timeouts.operation) or ()
    return msg.BridgeStatus(
        node=config.node.name,
        index=bridge.config.index,
        pid=how.pid,
        restarts=how.restarts,
        gpu=bridge.config.gpu,
        slots=config.arena.slots,
        slot_bytes=config.arena.slot_bytes,
        outstanding=sum(account.outstanding for account in accounts),
        error=how.last_error.message if how.last_error is not None else None,
        taken=slots_taken(server, bridge.config.index),
        exports=sum(account.exports for account in accounts),
        revoked=sum(account.revoked for account in accounts),
        holding={account.reader: account.outstanding for account in accounts if account.outstanding},
    )


def slots_taken(server: Server, bridge: int) -> int:
    """Return how many slots hold a bucket; for a push from elsewhere, how many an engine here still reads."""
    if server.trainers.push is not None:
        return server.trainers.push.session.taken(server.config.node.name, bridge)
    context = server.follower.context
    if context is None:
        return 0
    slots = {context.slots[bucket][0] for _, bucket in context.held if bucket in context.slots}
    return sum(slot.bridge == bridge for slot in slots)


def _peer(server: Server, name: str) -> msg.PeerStatus:
    peer = server.peers[name]
    return msg.PeerStatus(
        node=name,
        state=server.rails.state_of(name),
        endpoint=peer.endpoint,
        engines=len(peer.engines),
        bridges=len(peer.info.slots) if peer.info is not None else 0,
        device=peer.info.device if peer.info is not None else "",
    )
