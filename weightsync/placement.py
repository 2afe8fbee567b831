"""Where a node's arenas lie and how large they are, where its config leaves that open: decided once, at the start."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec

from weightsync.errors import ConfigError
from weightsync.gpus import all_gpus, free_memory, seen_by

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightsync.config import NodeConfig

__all__ = ["placed"]

_HOST_SLOT = 128 * 2**20  # bytes
_SMALLEST, _LARGEST = 64 * 2**20, 2 * 2**30  # bytes; of a slot on a GPU
_SHARE = 0.05  # of a GPU's free memory: engine and trainer share it too


def placed(config: NodeConfig, environment: Mapping[str, str] = os.environ) -> NodeConfig:
    """The config with every choice made: `arena.device`, `arena.slot_bytes`, `node.gpus` and `node.bridges`.

    Slots lie on GPUs where there are any, one bridge for each that is visible here. Asks nvidia-smi; makes no CUDA
    context. Raises `ConfigError` where the config wants GPUs that are not there.
    """
    node, arena = config.node, config.arena
    if arena.device == "cpu" or (arena.device == "auto" and not (gpus := _gpus(config, environment))):
        bridges, slot_bytes, gpus, device = node.bridges or 1, arena.slot_bytes or _HOST_SLOT, [], "cpu"
    else:
        gpus, device = _gpus(config, environment), "cuda"
        if not gpus:
            raise ConfigError(
                'arena.device = "cuda": weightsyncd sees no GPU', hint="nvidia-smi -L lists those there are"
            )
        if node.bridges not in (0, len(gpus)):
            raise ConfigError(
                f"node.bridges = {node.bridges}: with slots on GPUs there is one for each, {len(gpus)} here",
                hint="leave node.bridges away, and name the GPUs to use in node.gpus",
            )
        bridges, slot_bytes = len(gpus), arena.slot_bytes or _slot_bytes(gpus, arena.slots)
    return msgspec.structs.replace(
        config,
        node=msgspec.structs.replace(node, bridges=bridges, gpus=tuple(gpus)),
        arena=msgspec.structs.replace(arena, device=device, slot_bytes=slot_bytes),
    )


def _gpus(config: NodeConfig, environment: Mapping[str, str]) -> list[str]:
    seen = seen_by(environment, all_gpus())
    wanted = [name.removeprefix("GPU-") for name in config.node.gpus]
    if missing := [name for name in wanted if name not in seen]:
        raise ConfigError(
            f"node.gpus: weightsyncd does not see GPU {missing[0]}",
            hint=f"it sees {', '.join(seen) or 'none'}; look at its CUDA_VISIBLE_DEVICES",
        )
    return wanted or seen


def _slot_bytes(gpus: list[str], slots: int) -> int:
    """The largest power of two of which `slots` are a small share of what is free on each GPU now."""
    free = free_memory()
    least = min((free[gpu] for gpu in gpus if gpu in free), default=0)
    size = _LARGEST
    while size > _SMALLEST and size * slots > _SHARE * least:
        size //= 2
    return size
