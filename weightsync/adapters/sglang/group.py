"""Stock SGLang's `/update_weights_from_distributed`: its ranks take each tensor from a process group with a bridge.

For engines whose node runs no weightsyncd: nothing of ours has to be there, and no memory is shared. The daemon has the
bridge send a bucket while this asks the engine to take it; either fails if the other does.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsync.adapters.http import EngineAnswer
from weightsync.adapters.sglang.paths import SELECTORS, LoadPath, Session, refuse_stock
from weightsync.errors import EngineError, EngineLost, EngineRefused, LocalProtocolError
from weightsync.transports.group import GroupOffer, GroupTicket

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.adapters.sglang.profiles import Profile
    from weightsync.adapters.sglang.server import SGLangServer
    from weightsync.plan.manifest import Manifest

__all__ = ["GroupPath"]

logger = logging.getLogger(__name__)


class GroupPath(LoadPath):
    """Buckets through process groups, one with each bridge."""

    name = "group"
    transport = "group"

    def __init__(self, server: SGLangServer, profile: Profile, target: str) -> None:
        self._server = server
        self._session = Session(server, profile, target)
        self._manifest: Manifest | None = None
        self._joined: dict[int, str] = {}  # index of a bridge → the group with it
        self._models: dict[str, Any] = {}
        if profile.draft == "selector":
            self._models = {"selector": SELECTORS[target]}
        elif profile.draft == "disable_draft_model" and target == "model":
            self._models = {"disable_draft_model": True}

    async def accept(self, manifest: Manifest, *, deadline: float) -> tuple[str, ...]:
        """See the base class. No stock server tells which names it knows; its checkpoint was asked before."""
        refuse_stock(manifest, self._server.engine)
        table = manifest.tensors
        empty = np.flatnonzero(table.sizes == 0)
        if len(empty):
            raise EngineRefused(
                f"{table.names[int(empty[0])]!r} has no elements, and cannot be broadcast",
                engine=self._server.engine,
                phase="accept",
                hint="leave it out",
            )
        return ()

    async def begin(self, manifest: Manifest, offers: Sequence[Sequence[bytes]], *, deadline: float) -> None:
        """See the base class. Joins the groups it has not joined, which replace those it had."""
        self._manifest = None
        for bridge, offer in enumerate(offers[0]):
            await self._join(bridge, GroupOffer.unpack(offer), deadline)
        await self._session.open(deadline=deadline)
        self._manifest = manifest

    async def load(self, bucket: int, tickets: Sequence[bytes], *, deadline: float) -> None:
        if self._manifest is None:
            raise LocalProtocolError("no update is open", engine=self._server.engine, hint="begin first")
        table, pieces = self._manifest.tensors, self._manifest.bucket_pieces(bucket)
        tensors = [int(self._manifest.piece_tensor[piece]) for piece in pieces]
        body = {
            "names": [table.names[tensor] for tensor in tensors],
            "dtypes": [table.dtypes[tensor] for tensor in tensors],
            "shapes": [list(table.shapes[tensor]) for tensor in tensors],
            "group_name": GroupTicket.unpack(tickets[0]).group,
            "flush_cache": False,
            **self._models,
        }
        try:
            await self._server.call("/update_weights_from_distributed", body, deadline=deadline)
        except EngineLost:
            self._manifest = None
            raise
        except EngineError:
            self._manifest = None
            await self._session.abandon(deadline=deadline)
            raise

    async def finish(self, *, deadline: float) -> None:
        self._manifest = None
        await self._session.end(deadline=deadline)

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
