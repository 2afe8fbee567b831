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
    """Return the reading side of transport `name`. Raises `ConfigError` for an unknown name.

    `options` are the arguments of its class: none for shm, a device for cuda-ipc.
    """
    where = RECEIVERS.get(name)
    if where is None:
        raise ConfigError(f"there is no transport {name!r}", hint=f"one of: {', '.join(RECEIVERS)}")
    module, _, kind = where.partition(":")
    made: BucketReceiver = getattr(import_module(module), kind)(**options)
    return made
