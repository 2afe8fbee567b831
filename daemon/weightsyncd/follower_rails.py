"""What this node's bridges do on rails for a push that another daemon coordinates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsync.errors import RemoteProtocolError
from weightsync.nccl_bridge import commands
from weightsync.session import instructions as do
from weightsync.wire import messages as msg

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.config import NodeConfig
    from weightsyncd.bridges import Bridge
    from weightsyncd.executor import NodeExecutor
    from weightsyncd.held_push import HeldPush

__all__ = ["AtRail", "FollowerRails"]

AtRail = msg.JoinRail | msg.Receive | msg.Exchange | msg.Prepare | msg.Collect
"""A coordinator's messages for a bridge."""
Work = msg.Receive | msg.Exchange | msg.Prepare | msg.Collect


class FollowerRails:
    """See the module."""

    def __init__(self, config: NodeConfig, executor: NodeExecutor, bridges: Sequence[Bridge]) -> None:
        self._node, self._slots = config.node.name, config.arena.slots
        self._executor = executor
        self._bridges = bridges

    def check(self, message: AtRail) -> None:
        """Raise `RemoteProtocolError` if a message is for a bridge or a slot that does not exist."""
        if message.rail >= len(self._bridges):
            raise RemoteProtocolError(f"node {self._node} has no bridge {message.rail}")
        if isinstance(message, msg.Receive | msg.Exchange):
            self.check_slot(do.Slot(self._node, message.rail, message.slot))

    def check_slot(self, slot: do.Slot) -> None:
        """Raise `RemoteProtocolError` if a slot that an instruction names does not exist."""
        if not (0 <= slot.bridge < len(self._bridges) and 0 <= slot.index < self._slots):
            raise RemoteProtocolError(f"node {self._node} has no slot {slot.bridge}/{slot.index}")

    async def do(self, held: HeldPush, message: Work, until: float) -> None:
        """Carry out a message at its bridge, for the push that holds this node. Raises `WeightSyncError`."""
        bridge, context = self._bridges[message.rail], held.context
        match message:
            case msg.Receive():
                slot = do.Slot(self._node, message.rail, message.slot)
                await self._executor.exports.receive(context, message.bucket, slot, message.ticket, until)
            case msg.Exchange():
                if held.branch is not None:
                    held.branch.check_arena(message.rail)
                context.arenas[message.bucket] = bridge.incarnation
                if message.checksum is not None:
                    context.sums[message.bucket] = message.checksum
                command = commands.Exchange(
                    slot=message.slot,
                    generation=message.generation,
                    token=message.token,
                    parts=message.parts,
                )
                await bridge.call(command, deadline=until)
            case msg.Prepare():
                await self._executor.deliveries.prepare_to_collect(context, bridge, message, until)
            case msg.Collect():
                collect = commands.Collect(generation=message.generation, token=message.token)
                await bridge.call(collect, deadline=until)
