"""Transports by name. A module is loaded when its transport is first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from weightsync.errors import ConfigError

if TYPE_CHECKING:
    from weightsync.transports.base import BucketReceiver

__all__ = ["RECEIVERS", "receiver"]

RECEIVERS = {
    "shm": "weightsync.transports.shm:ShmReceiver",
    "cuda-ipc": "weightsync.transports.cuda_ipc:CudaIpcReceiver",
    "gloo": "weightsync.transports.gloo:GlooReceiver",
    "nccl": "weightsync.transports.nccl:NcclReceiver",
}


def receiver(name: str, **options: Any) -> BucketReceiver:
    """The reading side of transport `name`. Its class names what it needs: shm nothing, cuda-ipc a device.

    Raises `ConfigError` for a name that is unknown.
    """
    where = RECEIVERS.get(name)
    if where is None:
        raise ConfigError(f"there is no transport {name!r}", hint=f"one of: {', '.join(RECEIVERS)}")
    module, _, kind = where.partition(":")
    made: BucketReceiver = getattr(import_module(module), kind)(**options)
    return made
