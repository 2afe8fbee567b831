"""The common part of stock paths that make one call for each bucket, within a session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightsync.adapters.sglang.path import SELECTORS, EnginePath, Session
from weightsync.adapters.sglang.payloads import DTYPES
from weightsync.errors import EngineError, EngineLost, EngineRefused, LocalProtocolError

if TYPE_CHECKING:
    from weightsync.adapters.sglang.profiles import Profile
    from weightsync.adapters.sglang.server import Server
    from weightsync.plan.manifest import Manifest

__all__ = ["StockPath", "refuse_stock"]


class StockPath(EnginePath):
    """A stock path that makes one call for each bucket, within a session."""

    def __init__(self, server: Server, profile: Profile, target: str) -> None:
        self._server = server
        self._session = Session(server, profile, target)
        self._manifest: Manifest | None = None
        self._models: dict[str, Any] = {}  # fields of a call that say which of the engine's models are meant
        if profile.draft == "selector":
            self._models = {"selector": SELECTORS[target]}
        elif profile.draft == "disable_draft_model" and target == "model":
            self._models = {"disable_draft_model": True}

    async def accept(self, manifest: Manifest, *, deadline: float) -> tuple[str, ...] | None:
        """See the base class. Stock servers do not say which names they know; the adapter checked their checkpoint."""
        refuse_stock(manifest, self._server.engine)
        return None

    async def finish(self, *, deadline: float) -> None:
        self._manifest = None
        await self._session.end(deadline=deadline)

    async def _open(self, manifest: Manifest, *, deadline: float) -> None:
        self._manifest = None
        await self._session.open(deadline=deadline)
        self._manifest = manifest

    def _opened(self) -> Manifest:
        if self._manifest is None:
            raise LocalProtocolError("no update is open", engine=self._server.engine, hint="begin first")
        return self._manifest

    async def _load(self, route: str, body: dict[str, Any], *, deadline: float) -> None:
        """Have the server load a bucket. After a failure no update is open."""
        try:
            await self._server.call(route, {**body, "flush_cache": False, **self._models}, deadline=deadline)
        except EngineLost:
            self._manifest = None
            raise
        except EngineError:
            self._manifest = None
            await self._session.abandon(deadline=deadline)
            raise


def refuse_stock(manifest: Manifest, engine: str) -> None:
    """Raise `EngineRefused` naming tensors that stock SGLang cannot take: larger than a bucket, or of unknown dtype."""
    table = manifest.tensors
    if cut := manifest.cut_tensors():
        largest = int(table.sizes[cut].max())
        names = ", ".join(repr(table.names[i]) for i in cut[:5])
        raise EngineRefused(
            f"{len(cut)} tensors are larger than a bucket, and stock SGLang takes whole ones only: {names}",
            engine=engine,
            phase="accept",
            hint=f"arena.slot_bytes of at least {largest}, or the engine's plugin",
        )
    for name, dtype in zip(table.names, table.dtypes, strict=True):
        if dtype not in DTYPES:
            raise EngineRefused(f"stock SGLang takes no {dtype}, the dtype of {name!r}", engine=engine, phase="accept")
