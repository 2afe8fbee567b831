"""Stock SGLang's `/update_weights_from_tensor`: a call for each bucket, a payload for each tensor-parallel rank.

Every rank opens only its own entry and opens it once, so each gets its own ticket, in a pickle written for it. A reply
says that all ranks have loaded (there is a barrier behind it), or that rank 0 could not; a payload that cannot be
opened ends the scheduler, which then does not answer at all.

`flush_cache` stays off for every bucket and the cache is flushed once, by a call of its own, in `finish` of the push:
before 0.5.21 a flush that the scheduler refuses here is an assertion that ends it, and later it is a failure of a load
that did succeed.
"""

from __future__ import annotations

from base64 import b64encode
from typing import TYPE_CHECKING, Any

from weightsync.adapters.sglang.paths import SELECTORS, LoadPath, Session, refuse_stock
from weightsync.adapters.sglang.payloads import flattened_bucket
from weightsync.errors import EngineError, EngineLost, LocalProtocolError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.adapters.sglang.profiles import Profile
    from weightsync.adapters.sglang.server import SGLangServer
    from weightsync.plan.manifest import Manifest

__all__ = ["TensorPath"]


class TensorPath(LoadPath):
    """Buckets as flattened tensors."""

    name = "tensor"

    def __init__(self, server: SGLangServer, profile: Profile, target: str, gpus: Sequence[str | None]) -> None:
        """`gpus` are the UUIDs of the ranks' GPUs, by tp rank; None for ranks on a CPU."""
        self._server = server
        self._gpus = gpus
        self.transport = "torch-shm" if gpus[0] is None else "torch-cuda"
        self._session = Session(server, profile, target)
        self._manifest: Manifest | None = None
        self._models: dict[str, Any] = {}
        if profile.draft == "selector":
            self._models = {"selector": SELECTORS[target]}
        elif profile.draft == "disable_draft_model" and target == "model":
            self._models = {"disable_draft_model": True}

    async def accept(self, manifest: Manifest, *, deadline: float) -> tuple[str, ...]:
        """See the base class. No stock server tells which names it knows; its checkpoint was asked before."""
        refuse_stock(manifest, self._server.engine)
        return ()

    async def begin(self, manifest: Manifest, offers: Sequence[Sequence[bytes]], *, deadline: float) -> None:
        """See the base class. There is nothing to attach to."""
        self._manifest = None
        await self._session.open(deadline=deadline)
        self._manifest = manifest

    async def load(self, bucket: int, tickets: Sequence[bytes], *, deadline: float) -> None:
        if self._manifest is None:
            raise LocalProtocolError("no update is open", engine=self._server.engine, hint="begin first")
        manifest = self._manifest
        body = {
            "serialized_named_tensors": [
                b64encode(flattened_bucket(ticket, gpu, manifest, bucket)).decode()
                for ticket, gpu in zip(tickets, self._gpus, strict=True)
            ],
            "load_format": "flattened_bucket",
            "flush_cache": False,
            **self._models,
        }
        try:
            await self._server.call("/update_weights_from_tensor", body, deadline=deadline)
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
