"""Find out which GPUs an engine's readers use: a CUDA-IPC handle for a stock engine must name the reader's GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from weightsync.errors import EngineError
from weightsync.gpus import all_gpus, seen_by
from weightsync.processes import environment, listener

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["reader_gpus"]


def reader_gpus(url: str, ordinals: Sequence[int], *, named: Sequence[str], engine: str) -> list[str]:
    """Return the UUID of each reader's GPU, by tp_rank.

    `ordinals` are their CUDA device numbers inside the engine's process. `named`, from the operator's config, wins;
    without it the environment of the process that listens at `url` decides. Raises `EngineError` if neither tells.
    """
    if named:
        if len(named) != len(ordinals):
            raise EngineError(
                f"the config of engine {engine} names {len(named)} GPUs, and it has {len(ordinals)} ranks",
                engine=engine,
                hint="gpus has one UUID for each tensor-parallel rank, in their order",
            )
        return [name.removeprefix("GPU-") for name in named]
    parts = urlsplit(url)
    pid = listener(parts.port or (443 if parts.scheme == "https" else 80))
    seen = seen_by(environment(pid), all_gpus()) if pid is not None else []
    if any(at >= len(seen) for at in ordinals):
        raise EngineError(
            f"cannot determine which GPUs engine {engine}'s {len(ordinals)} ranks use: "
            + (f"its process ({pid}) sees {len(seen)}" if pid is not None else f"nobody is seen to listen at {url}"),
            engine=engine,
            hint='name them in its config: gpus = ["GPU-…", …], by tensor-parallel rank (nvidia-smi -L lists them)',
        )
    return [seen[at] for at in ordinals]
