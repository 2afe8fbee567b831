"""When a rank's weights are what they should be: what computes them may still be under way on its GPU."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["weights_ready"]


def weights_ready() -> torch.cuda.Event | None:
    """An event past all that the calling thread has asked its GPU for so far, such as the optimiser's last step.

    None where this process uses no GPU. Loads no torch.
    """
    module: Any = sys.modules.get("torch")
    if module is None or not module.cuda.is_initialized():
        return None
    event: torch.cuda.Event = module.cuda.Event()
    event.record()
    return event
