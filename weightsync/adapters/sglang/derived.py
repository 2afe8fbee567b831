"""What SGLang makes of weights and keeps outside of the model's parameters.

Nothing is imported here: what the scheduler has not loaded keeps nothing.
"""

from __future__ import annotations

import sys

__all__ = ["forget_embeddings"]

_EMBEDDINGS = ("sglang.srt.managers.mm_schedule", "sglang.srt.managers.mm_utils")
"""Where `embedding_cache` is in 0.5.23, and where it was before."""


def forget_embeddings() -> None:
    """Empty this scheduler's cache of image embeddings: its key is the image alone, and `/flush_cache` leaves it."""
    for module in _EMBEDDINGS:
        clear = getattr(getattr(sys.modules.get(module), "embedding_cache", None), "clear", None)
        if clear is not None:
            clear()
