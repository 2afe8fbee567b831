"""A bridge's part in one generation: its communicator, and the sender, receiver and exchange that use it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from weightsync.nccl_bridge.exchange import DeviceExchange, Exchange, HostExchange
from weightsync.nccl_bridge.gloo import GlooCommunicator
from weightsync.nccl_bridge.nccl import NcclCommunicator
from weightsync.transports.gloo import GlooReceiver, GlooSender
from weightsync.transports.nccl import NcclReceiver, NcclSender

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from weightsync.ipc.arena import Arena
    from weightsync.ipc.cuda import DeviceSlots
    from weightsync.ipc.ledger import Ledger
    from weightsync.nccl_bridge import commands as c
    from weightsync.transports.exports import Checksums

__all__ = ["Member", "new_member"]


class Member(NamedTuple):
    """This bridge's part in one generation."""

    communicator: GlooCommunicator | NcclCommunicator
    sender: GlooSender | NcclSender
    receiver: GlooReceiver | NcclReceiver
    exchange: Exchange


def new_member(
    command: c.Join,
    name: str,
    arena: Arena,
    slots: DeviceSlots | None,
    *,
    ledger: Ledger,
    checksums: Checksums,
    one_by_one: threading.Lock,
    check: Callable[[], object],
) -> Member:
    """Make a member that has not joined yet: over NCCL if `slots` lie on a GPU, else over gloo.

    `name` is the bridge's; the communicators of this process share `one_by_one`; `check` raises to give up.
    """
    place: Any = {
        "generation": command.generation,
        "rank": command.rank,
        "world": command.world,
        "address": command.address,
    }
    books: Any = {"ledger": ledger, "checksums": checksums}
    if slots is not None:
        device = NcclCommunicator(**place)
        return Member(
            device,
            NcclSender(device, arena, slots, **books),
            NcclReceiver(device, arena, slots, name),
            DeviceExchange(device, slots, arena.slot_bytes),
        )
    host = GlooCommunicator(**place, one_by_one=one_by_one)
    return Member(
        host, GlooSender(host, arena, **books), GlooReceiver(host, arena, name), HostExchange(host, arena, check)
    )
