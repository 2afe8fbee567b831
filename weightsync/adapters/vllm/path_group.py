"""The path through stock vLLM's `nccl` backend: workers take each tensor from a communicator with a bridge.

For engines whose node runs no weightsyncd: nothing of ours is installed there, and no memory is shared. The daemon has
the bridge send a bucket while this path asks the server to take it; if one side fails, so does the other. Workers are
in one group at a time, and its rank 0 sends, so all buckets must be in the slots of one bridge.

Source: `NCCLWeightTransferEngine` of vLLM 0.26 and 0.32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from weightsync.adapters.vllm.path_stock import StockPath
from weightsync.adapters.vllm.server import first_names
from weightsync.transports.group import GroupOffer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.adapters.vllm.server import Server
    from weightsync.plan.manifest import Manifest

__all__ = ["GroupPath"]

_DTYPES = frozenset(
    ("int8", "uint8", "int32", "int64", "float16", "float32", "float64", "bfloat16", "float8_e4m3fn")
)  # of `ncclDataTypeEnum`, vLLM 0.26 and 0.32


class GroupPath(StockPath):
    """Has workers take buckets from a process group with one bridge. Needs slots on GPUs."""

    name = "group"
    transport = "group-vllm"

    def __init__(self, server: Server, *, draft: bool) -> None:
        super().__init__(server, draft=draft)
        self._joined = ""  # the group that its workers are in

    async def accept(self, manifest: Manifest, *, whole: bool, deadline: float) -> tuple[str, ...] | None:
        """See the base class."""
        if not self.server.profile.brackets:
            raise self.refused(
                f"vllm {self.server.version} is not known to load so", "vllm 0.21 or later, or our plugin"
            )
        untouched = await super().accept(manifest, whole=whole, deadline=deadline)
        table = manifest.tensors
        if len(senders := np.unique(manifest.bucket_owner)) > 1:
            raise self.refused(
                f"stock vllm takes weights from one sender, and buckets are in the slots of {len(senders)} bridges",
                "push again, if this engine has only just been found on this node; node.gpus with one GPU, if another "
                "node pushes; or our plugin",
            )
        if cut := manifest.cut_tensors():
            names = [repr(table.names[i]) for i in cut]
            raise self.refused(
                f"{len(cut)} tensors are larger than a bucket, and stock vllm takes whole ones only: "
                f"{first_names(names, len(names))}",
                f"arena.slot_bytes of at least {int(table.sizes[cut].max())}, or our plugin",
            )
        for name, dtype in zip(table.names, table.dtypes, strict=True):
            if dtype not in _DTYPES:
                raise self.refused(f"vllm broadcasts no {dtype}, the dtype of {name!r}", "our plugin, which takes it")
        if len(empty := np.flatnonzero(table.sizes == 0)):
            raise self.refused(
                f"{table.names[int(empty[0])]!r} has no elements, and cannot be broadcast", "leave it out"
            )
        return untouched

    async def _attach(self, offers: Sequence[Sequence[bytes]], *, deadline: float) -> None:
        offer = GroupOffer.unpack(offers[0][0])
        if offer.name == self._joined:
            return
        self._joined = ""
        init: dict[str, Any] = {
            "master_address": offer.host,
            "master_port": offer.port,
            "rank_offset": 1,
            "world_size": offer.world,
        }
        await self.server.http.post("/init_weight_transfer_engine", {"init_info": init}, deadline=deadline)
        self._joined = offer.name

    async def load(self, bucket: int, tickets: Sequence[bytes], *, deadline: float) -> None:
        await self.load_several(bucket, [tickets], deadline=deadline)

    async def load_several(self, first: int, tickets: Sequence[Sequence[bytes]], *, deadline: float) -> None:
        """See the base class. Sends one request for all: a request takes vLLM as long as many buckets take the wire."""
        manifest = self._updated()
        table = manifest.tensors
        tensors = [tensor for each in range(len(tickets)) for tensor in manifest.bucket_tensors(first + each)]
        info = {
            "names": [table.names[tensor] for tensor in tensors],
            "dtype_names": [table.dtypes[tensor] for tensor in tensors],
            "shapes": [list(table.shapes[tensor]) for tensor in tensors],
        }
        with self._watched():
            await self.server.http.post("/update_weights", {"update_info": info}, deadline=deadline)
