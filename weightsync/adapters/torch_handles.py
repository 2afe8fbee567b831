"""Tickets of stock engines as what torch in the engine's worker makes of them, for `weightsync.pickling`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightsync.pickling import Call, Global

if TYPE_CHECKING:
    from weightsync.transports.torch_cuda import TorchCudaTicket
    from weightsync.transports.torch_shm import TorchShmTicket

__all__ = ["cuda_args", "host_buffer"]

_BYTES = Global("torch", "uint8")


def host_buffer(ticket: TorchShmTicket) -> Call:
    """The expression whose value is the bucket in host memory, uint8 [nbytes]; it may be evaluated once."""
    storage = Call(
        Global("torch.multiprocessing.reductions", "rebuild_storage_filename"),
        (Global("torch.storage", "TypedStorage"), b"", ticket.handle, ticket.nbytes, _BYTES),
    )
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), (storage, 0, (ticket.nbytes,), (1,), False, None))


def cuda_args(ticket: TorchCudaTicket, device: int | str) -> tuple[Any, ...]:
    """The 15 arguments of `torch.multiprocessing.reductions.rebuild_cuda_tensor` for the bucket, uint8 [nbytes].

    `device` is the reader's own: its ordinal or, for SGLang, its UUID. May be called once.
    """
    return (
        Global("torch", "Tensor"),
        (ticket.nbytes,),
        (1,),
        0,
        Global("torch.storage", "TypedStorage"),
        _BYTES,
        device,
        ticket.storage_handle,
        ticket.nbytes,
        ticket.storage_offset,
        False,
        ticket.counter_handle,
        ticket.counter,
        b"",  # no event to wait for: the slot was filled, and the host knew, before this was made
        False,
    )
