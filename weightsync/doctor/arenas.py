"""Arenas that exist already."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weightsync.config import NodeConfig

__all__ = ["held"]


def held(config: NodeConfig) -> int:
    """Return the bytes of this node's existing arenas: a running weightsyncd's, which a new one would replace."""
    nbytes = 0
    for file in Path(config.node.shm_dir).glob(f"weightsync-{os.geteuid()}-{config.node.name}-*"):
        with suppress(FileNotFoundError):  # removed meanwhile
            nbytes += file.stat().st_blocks * 512
    return nbytes
