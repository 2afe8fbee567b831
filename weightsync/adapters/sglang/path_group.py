"""Stock SGLang's `/update_weights_from_distributed`: its ranks take each tensor from a process group with a bridge.

For engines whose node runs no weightsyncd: nothing of ours is installed there, and no memory is shared. The daemon has
the bridge send a bucket while this path asks the engine to take it; if one side fails, so does the other.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from weightsync.adapters.http import EngineAnswer
from weightsync.adapters.sglang.path_stock import StockPath
from weightsync.errors import EngineRefused
from weightsync.transports.group import GroupOffer, GroupTicket

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.adapters.sglang.profiles import Profile
    from weightsync.adapters.sglang.server import Server
    from weightsync.plan.manifest import Manifest

__all__ = ["GroupPath"]

logger = logging.getLogger(__name__)


class GroupPath(StockPath):
    """Buckets through process groups, one with each bridge."""

    name = "group"
    transport = "group"

    def __init__(self, server: Server, profile: Profile, target: str) -> None:
        super().__init__(server, profile, target)
        self._joined: dict[int, str] = {}  # index of a bridge → the group with it

    async def accept(self, manifest: Manifest, *, deadline: float) -> tuple[str, ...] | None:
        """See the base class."""
        table = manifest.tensors
        empty = np.flatnonzero(table.sizes == 0)
        if len(empty):
            raise EngineRefused(
                f"{table.names[int(empty[0])]!r} has no elements, and cannot be broadcast",
                engine=self._server.engine,
                phase="accept",
                hint="leave it out",
            )
        return await super().accept(manifest, deadline=deadline)

    async def begin(self, manifest: Manifest, offers: Sequence[Sequence[bytes]], *, deadline: float) -> None:
        """See the base class. Joins each bridge's group that is new, and leaves that bridge's earlier group first."""
        for bridge, offer in enumerate(offers[0]):
            await self._join(bridge, GroupOffer.unpack(offer), deadline)
        await self._open(manifest, deadline=deadline)

    async def load(self, bucket: int, tickets: Sequence[bytes], *, deadline: float) -> None:
        manifest = self._opened()
        table = manifest.tensors
        tensors = manifest.bucket_tensors(bucket)
        body = {
            "names": [table.names[tensor] for tensor in tensors],
            "dtypes": [table.dtypes[tensor] for tensor in tensors],
            "shapes": [list(table.shapes[tensor]) for tensor in tensors],
            "group_name": GroupTicket.unpack(tickets[0]).group,
        }
        await self._load("/update_weights_from_distributed", body, deadline=deadline)

    async def _join(self, bridge: int, offer: GroupOffer, deadline: float) -> None:
        known = self._joined.get(bridge)
        if known == offer.name:
            return
        if known is not None:
            del self._joined[bridge]
            try:
                await self._server.call("/destroy_weights_update_group", {"group_name": known}, deadline=deadline)
            except EngineAnswer as answer:
                logger.debug("[engine=%s] group %s: %s", self._server.engine, known, answer.reason)
        body = {
            "master_address": offer.host,
            "master_port": offer.port,
            "rank_offset": 1,
            "world_size": offer.world,
            "group_name": offer.name,
            "backend": offer.backend,
        }
        await self._server.call("/init_weights_update_group", body, deadline=deadline)
        self._joined[bridge] = offer.name
