"""Stock SGLang's `/update_weights_from_tensor`: a call for each bucket, a payload for each tensor-parallel rank.

Every rank opens only its own entry, once, so each gets its own ticket in a pickle written for it. A reply says either
that all ranks have loaded (SGLang has a barrier before it), or that rank 0 could not. A payload that cannot be opened
ends the scheduler, which then does not answer at all.

`flush_cache` stays off for every bucket; the adapter's `finish` flushes the cache once, in a call of its own. A flush
within this call can be refused by the scheduler. Before 0.5.21 that fails an assertion and ends the scheduler; later
versions report a failure although the load succeeded.
"""

from __future__ import annotations

from base64 import b64encode
from typing import TYPE_CHECKING

from weightsync.adapters.sglang.path_stock import StockPath
from weightsync.adapters.sglang.payloads import flattened_bucket

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.adapters.sglang.profiles import Profile
    from weightsync.adapters.sglang.server import Server
    from weightsync.plan.manifest import Manifest

__all__ = ["TensorPath"]


class TensorPath(StockPath):
    """Sends buckets as flattened tensors."""

    name = "tensor"

    def __init__(self, server: Server, profile: Profile, target: str, gpus: Sequence[str | None]) -> None:
        """`gpus` are the UUIDs of the ranks' GPUs, by tp_rank; None for ranks on a CPU."""
        super().__init__(server, profile, target)
        self._gpus = gpus
        self.transport = "torch-shm" if gpus[0] is None else "torch-cuda"

    async def begin(self, manifest: Manifest, offers: Sequence[Sequence[bytes]], *, deadline: float) -> None:
        """See the base class. Nothing is attached to: each bucket comes with its own handle."""
        await self._open(manifest, deadline=deadline)

    async def load(self, bucket: int, tickets: Sequence[bytes], *, deadline: float) -> None:
        manifest = self._opened()
        payloads = [
            b64encode(flattened_bucket(ticket, gpu, manifest, bucket)).decode()
            for ticket, gpu in zip(tickets, self._gpus, strict=True)
        ]
        body = {"serialized_named_tensors": payloads, "load_format": "flattened_bucket"}
        await self._load("/update_weights_from_tensor", body, deadline=deadline)
