"""The pickles that stock SGLang servers take, written without torch, each for one reader.

`opened` turns a ticket into the expression that opens it; the rest is the same for every kind of memory. SGLang's
unpickler lets only known globals through (`SafeUnpickler.ALLOWED_GLOBALS` since 0.5.21, prefixes before). The pickles
here use torch's own rebuild functions, `torch.Size`, dtypes and `types.SimpleNamespace`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightsync.adapters.torch_handles import cuda_args, host_buffer
from weightsync.pickling import Call, Global, dumps, namespace
from weightsync.transports.torch_cuda import TorchCudaTicket
from weightsync.transports.torch_shm import TorchShmTicket

if TYPE_CHECKING:
    from weightsync.plan.manifest import Manifest

__all__ = ["DTYPES", "close_buffer", "end", "flattened_bucket", "open_buffer", "opened", "tensor_list"]

DTYPES = frozenset(
    {
        *("float32", "float16", "bfloat16", "float64", "int8", "uint8", "int16", "int32", "int64", "bool"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    }
)
"""Element types whose names every SGLang since 0.5.9 accepts in a pickle."""

_REBUILD_CUDA = Global("torch.multiprocessing.reductions", "rebuild_cuda_tensor")
_FIRST = Call(
    Global("functools", "partial"),
    (Global("builtins", "min"),),
    (Global("builtins", "min"), (), {"key": Global("builtins", "callable")}, None),
)
"""A function that returns its first argument: none of the arguments is callable, so to `min` all are equally small."""


def opened(ticket: bytes, gpu: str | None) -> Call:
    """Make the expression whose value is the bucket, as a uint8 tensor; it may be evaluated once.

    `gpu` is the UUID of the reader's GPU, which SGLang's patched torch accepts as a device; None for a reader on a CPU.
    """
    if gpu is None:
        return host_buffer(TorchShmTicket.unpack(ticket))
    return Call(_REBUILD_CUDA, cuda_args(TorchCudaTicket.unpack(ticket), gpu))


def flattened_bucket(ticket: bytes, gpu: str | None, manifest: Manifest, bucket: int) -> bytes:
    """Make one rank's payload of `/update_weights_from_tensor` with `load_format="flattened_bucket"`."""
    metadata = [namespace(**item) for item in _items(manifest, bucket)]
    return dumps({"flattened_tensor": opened(ticket, gpu), "metadata": metadata})


def open_buffer(ticket: bytes, gpu: str | None) -> bytes:
    """Make checkpoint-engine's first message: a function and its arguments, which together make the buffer.

    The worker replaces argument 6 by its own device. A CUDA handle needs that; on a CPU, where the device is "cpu", the
    function must ignore it.
    """
    if gpu is None:
        return dumps((_FIRST, (opened(ticket, None), 0, 0, 0, 0, 0, 0)))
    return dumps((_REBUILD_CUDA, cuda_args(TorchCudaTicket.unpack(ticket), 0)))


def close_buffer() -> bytes:
    """Make checkpoint-engine's first message for an empty buffer, so that the worker releases the one it has."""
    return dumps((_FIRST, (Call(Global("torch", "ByteTensor"), (0,)), 0, 0, 0, 0, 0, 0)))


def tensor_list(manifest: Manifest, bucket: int) -> bytes:
    """Make checkpoint-engine's second message: where each tensor lies in the buffer."""
    return dumps(
        [
            {"name": item["name"], "shape": item["shape"], "dtype": item["dtype"], "offset": item["start_idx"]}
            for item in _items(manifest, bucket)
        ]
    )


def end() -> bytes:
    """Make checkpoint-engine's last message, which ends the update."""
    return dumps(None)


def _items(manifest: Manifest, bucket: int) -> list[dict[str, Any]]:
    """Describe the bucket's tensors in SGLang's terms, where indices and `numel` are in bytes."""
    table, items = manifest.tensors, []
    for piece in manifest.bucket_pieces(bucket):
        tensor, start = int(manifest.piece_tensor[piece]), int(manifest.piece_offset[piece])
        nbytes = int(manifest.piece_nbytes[piece])
        items.append(
            {
                "name": table.names[tensor],
                "shape": Call(Global("torch", "Size"), (list(table.shapes[tensor]),)),
                "dtype": Global("torch", table.dtypes[tensor]),
                "start_idx": start,
                "end_idx": start + nbytes,
                "numel": nbytes,
            }
        )
    return items
