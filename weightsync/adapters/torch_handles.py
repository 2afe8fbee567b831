"""Turn tickets for stock engines into calls of torch's own rebuild functions, which `weightsync.pickling` writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightsync.pickling import Call, Global

if TYPE_CHECKING:
    from weightsync.transports.torch_cuda import TorchCudaTicket
    from weightsync.transports.torch_shm import TorchShmTicket

__all__ = ["cuda_args", "host_buffer"]

_BYTES = Global("torch", "uint8")


def host_buffer(ticket: TorchShmTicket) -> Call:
    """Make the expression whose value is the bucket in host memory, uint8 [nbytes]; it may be evaluated once."""
    storage = Call(
        Global("torch.multiprocessing.reductions", "rebuild_storage_filename"),
        (Global("torch.storage", "TypedStorage"), b"", ticket.handle, ticket.nbytes, _BYTES),
    )
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), (storage, 0, (ticket.nbytes,), (1,), False, None))


def cuda_args(ticket: TorchCudaTicket, device: int | str) -> tuple[Any, ...]:
    """Return the 15 arguments of `torch.multiprocessing.reductions.rebuild_cuda_tensor` for the bucket, uint8 [nbytes].

    `device` is the reader's GPU, by its ordinal or, for SGLang, its UUID. The result may be used in one call.
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
        b"",  # no event to wait for: the host knew that the slot was filled before the ticket was made
        False,
    )
