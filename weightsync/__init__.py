"""Moves new policy weights from an RL trainer into every inference engine.

    from weightsync import push_weights
    report = push_weights(model, version=step)

`push_weights` runs in the trainer's ranks and talks to `weightsyncd`, the node's service, which leads the push and
speaks to the engines. Importing this package loads nothing heavy: the first push loads torch, ZeroMQ and the rest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from weightsync.errors import WeightSyncError

if TYPE_CHECKING:
    from weightsync.report import EngineReport, PushReport
    from weightsync.trainer.client import PushHandle, push_weights, push_weights_async
    from weightsync.trainer.lora import LoraReport, push_lora

__all__ = [
    "EngineReport",
    "LoraReport",
    "PushHandle",
    "PushReport",
    "WeightSyncError",
    "__version__",
    "push_lora",
    "push_weights",
    "push_weights_async",
]

__version__ = "0.1.0"

_HOMES = {
    "EngineReport": "weightsync.report",
    "LoraReport": "weightsync.trainer.lora",
    "PushHandle": "weightsync.trainer.client",
    "PushReport": "weightsync.report",
    "push_lora": "weightsync.trainer.lora",
    "push_weights": "weightsync.trainer.client",
    "push_weights_async": "weightsync.trainer.client",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'weightsync' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
