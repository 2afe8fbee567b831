"""The path through stock vLLM's `ipc` backend: CUDA-IPC handles as pickles that the engine's worker opens.

To vLLM a bucket is one packed buffer: whole tensors back to back, which vLLM cuts apart by their sizes. The worker
clones the tensors before it answers. It keeps a bucket's mapping until the next bucket or the end of the update.
"""

from __future__ import annotations

import asyncio
from base64 import b64encode
from typing import TYPE_CHECKING, Any

from weightsync.adapters.torch_handles import cuda_args
from weightsync.adapters.vllm.path_stock import StockPath
from weightsync.adapters.vllm.server import first_names
from weightsync.errors import ConfigError, EngineError
from weightsync.pickling import dumps
from weightsync.transports.torch_cuda import TorchCudaTicket

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from weightsync.adapters.vllm.server import Server
    from weightsync.plan.manifest import Manifest

__all__ = ["IpcPath", "misfits", "update_info"]


def misfits(manifest: Manifest) -> list[str]:
    """Return a sentence for each tensor that a packed buffer cannot carry: cut up, behind a gap, or misaligned."""
    table = manifest.tensors
    found = []
    for piece in range(manifest.pieces):
        tensor = int(manifest.piece_tensor[piece])
        if int(manifest.piece_count[piece]) != table.numel(tensor):
            if int(manifest.piece_start[piece]) == 0:
                found.append(f"{table.names[tensor]!r} is cut over several buckets")
            continue
        bucket = int(manifest.piece_bucket[piece])
        first = piece == int(manifest.bucket_first[bucket])
        expected = 0 if first else int(manifest.piece_offset[piece - 1] + manifest.piece_nbytes[piece - 1])
        at, itemsize = int(manifest.piece_offset[piece]), int(table.itemsizes[tensor])
        if at != expected:
            found.append(f"{table.names[tensor]!r} starts {at - expected} bytes behind the tensor before it")
        elif at % itemsize:
            found.append(f"{table.names[tensor]!r} starts at byte {at}, no multiple of its {itemsize}")
    return found


def update_info(
    manifest: Manifest, bucket: int, handles: Mapping[str, tuple[Any, ...]], *, flagged: bool
) -> dict[str, Any]:
    """Make the `update_info` of one bucket.

    `handles`: a worker's GPU → the arguments of `rebuild_cuda_tensor` for its own handle. `flagged`: the update must
    say that it is packed.
    """
    table = manifest.tensors
    tensors = manifest.bucket_tensors(bucket)
    return {
        "names": [table.names[tensor] for tensor in tensors],
        "dtype_names": [table.dtypes[tensor] for tensor in tensors],
        "shapes": [list(table.shapes[tensor]) for tensor in tensors],
        "tensor_sizes": [table.nbytes(tensor) for tensor in tensors],
        "ipc_handles_pickled": b64encode(dumps(dict(handles))).decode("ascii"),
        **({"packed": True} if flagged else {}),
    }


class IpcPath(StockPath):
    """Sends buckets as CUDA-IPC handles. Needs `VLLM_ALLOW_INSECURE_SERIALIZATION=1` in the server, and GPUs."""

    name = "ipc"
    transport = "torch-cuda"

    def __init__(self, server: Server, *, draft: bool, gpus: Callable[[], Sequence[str]]) -> None:
        """`gpus` finds each worker's GPU. It may block, and is called until it succeeds once."""
        super().__init__(server, draft=draft)
        self._find_gpus = gpus
        self._gpus: tuple[str, ...] = ()

    async def accept(self, manifest: Manifest, *, whole: bool, deadline: float) -> tuple[str, ...] | None:
        """See the base class."""
        if self.server.profile.packed is None:
            raise self.refused(
                f"vllm {self.server.version} takes no packed buffers", "use our plugin, or vllm 0.22 or later"
            )
        untouched = await super().accept(manifest, whole=whole, deadline=deadline)
        if found := misfits(manifest):
            raise self.refused(
                f"stock ipc takes whole tensors back to back, and {first_names(found, len(found))}",
                "arena.alignment = 8 and an arena.slot_bytes above the largest tensor, or our plugin",
            )
        try:
            await self._readers()
        except (EngineError, ConfigError) as error:
            raise self.refused(error.message, error.hint) from error
        return untouched

    async def _attach(self, offers: Sequence[Sequence[bytes]], *, deadline: float) -> None:
        init = {"packed": True} if self.server.profile.packed == "init" else {}
        await self.server.http.post("/init_weight_transfer_engine", {"init_info": init}, deadline=deadline)

    async def load(self, bucket: int, tickets: Sequence[bytes], *, deadline: float) -> None:
        profile, manifest = self.server.profile, self._updated()
        # device 0 is a placeholder: the worker puts its own ordinal there
        handles = [cuda_args(TorchCudaTicket.unpack(ticket), 0) for ticket in tickets]
        by_worker = list(zip(await self._readers(), handles, strict=True))
        flagged = profile.packed == "update"
        info: Any
        if profile.per_worker:
            info = [update_info(manifest, bucket, dict([worker]), flagged=flagged) for worker in by_worker]
        else:
            info = update_info(manifest, bucket, dict(by_worker), flagged=flagged)
        with self._watched():
            await self.server.http.post("/update_weights", {"update_info": info}, deadline=deadline)

    async def _readers(self) -> tuple[str, ...]:
        if not self._gpus:
            gpus = tuple(await asyncio.to_thread(self._find_gpus))
            if len(set(gpus)) < len(gpus) and not self.server.profile.per_worker:
                raise EngineError(
                    f"several of its workers share a GPU, whose handles vllm {self.server.version} cannot tell apart",
                    engine=self.server.engine,
                    hint="our plugin, or vllm 0.29 or later",
                )
            self._gpus = gpus
        return self._gpus
