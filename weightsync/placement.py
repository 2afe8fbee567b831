"""Decides, once at the start, where a node's arenas lie and how large they are if its config leaves that open."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import msgspec

from weightsync.errors import ConfigError
from weightsync.gpus import Gpu, seen_by, survey

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightsync.config import NodeConfig

__all__ = ["keeper_gpu", "placed"]

logger = logging.getLogger(__name__)

_HOST_SLOT = 128 * 2**20  # bytes
_SMALLEST, _LARGEST = 64 * 2**20, 2 * 2**30  # bytes; of a slot on a GPU
_SHARE = 0.05  # of a GPU's free memory, which engine and trainer need too


def placed(
    config: NodeConfig, environment: Mapping[str, str] = os.environ, gpus: Sequence[Gpu] | None = None
) -> NodeConfig:
    """Return the config with every choice made: `arena.device`, `arena.slot_bytes`, `node.gpus` and `node.bridges`.

    If there are GPUs, slots lie on them, with one bridge for each GPU that is visible here. Calls nvidia-smi once
    unless `gpus` are given; makes no CUDA context. Raises `ConfigError` if the config wants GPUs that are not there.
    """
    node, arena = config.node, config.arena
    chosen: list[Gpu] = []
    if arena.device != "cpu":
        chosen = _chosen(config, environment, _there(config) if gpus is None else gpus)
    if chosen:
        bridges, slot_bytes, device = len(chosen), arena.slot_bytes or _slot_bytes(chosen, arena.slots), "cuda"
        if node.bridges not in (0, bridges):
            raise ConfigError(
                f"node.bridges = {node.bridges}: with slots on GPUs there is one for each, {bridges} here",
                hint="leave node.bridges away, and name the GPUs to use in node.gpus",
            )
    elif arena.device == "cuda":
        raise ConfigError('arena.device = "cuda": weightsyncd sees no GPU', hint="nvidia-smi -L lists those there are")
    else:
        bridges, slot_bytes, device = node.bridges or 1, arena.slot_bytes or _HOST_SLOT, "cpu"
    return msgspec.structs.replace(
        config,
        node=msgspec.structs.replace(node, bridges=bridges, gpus=tuple(gpu.uuid for gpu in chosen)),
        arena=msgspec.structs.replace(arena, device=device, slot_bytes=slot_bytes),
    )


def keeper_gpu(gpus: Sequence[str], others: int) -> str:
    """Return the GPU with which a keeper reads slots on `gpus` (UUIDs), given `others` keepers before it; "": none.

    The first keeper gets the last GPU, because a trainer's rank 0, and engines with fewer ranks than GPUs, take the
    first. Further keepers get other GPUs, as long as there are any.
    """
    return gpus[-1 - others % len(gpus)] if gpus else ""


def _there(config: NodeConfig) -> list[Gpu]:
    """Return this machine's GPUs; none, with a warning, if nvidia-smi fails and the config asks for no GPU."""
    try:
        return survey()
    except ConfigError as error:
        if config.arena.device == "cuda" or config.node.gpus:
            raise
        logger.warning("gpus.unknown: slots will lie in host memory, for %s", error.message)
        return []


def _chosen(config: NodeConfig, environment: Mapping[str, str], gpus: Sequence[Gpu]) -> list[Gpu]:
    known = {gpu.uuid: gpu for gpu in gpus}
    seen = seen_by(environment, list(known))
    wanted = [name.removeprefix("GPU-") for name in config.node.gpus]
    if missing := [name for name in wanted if name not in seen]:
        raise ConfigError(
            f"node.gpus: weightsyncd does not see GPU {missing[0]}",
            hint=f"it sees {', '.join(seen) or 'none'}; look at its CUDA_VISIBLE_DEVICES",
        )
    if divided := [name for name in wanted or seen if known[name].mig]:
        raise ConfigError(
            f"GPU {divided[0]} is in MIG mode: its instances share no memory with each other or with other GPUs",
            hint=f'nvidia-smi -i GPU-{divided[0]} -mig 0; or leave it out of node.gpus; or arena.device = "cpu"',
        )
    if len(set(wanted)) < len(wanted):
        raise ConfigError("node.gpus names a GPU twice", hint="each has one bridge: name it once")
    return [known[name] for name in wanted or seen]


def _slot_bytes(gpus: Sequence[Gpu], slots: int) -> int:
    """Return the bytes of a slot: the largest power of two at which all slots are at most `_SHARE` of each GPU.

    The share is of the memory that is free now. The result stays between `_SMALLEST` and `_LARGEST`.
    """
    least = min((gpu.free for gpu in gpus if gpu.free is not None), default=0)
    size = _LARGEST
    while size > _SMALLEST and size * slots > _SHARE * least:
        size //= 2
    return size
