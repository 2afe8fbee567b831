"""What SGLang makes of weights and keeps outside of the model's parameters.

Nothing is imported here: what the scheduler has not loaded keeps nothing.
"""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["forget_embeddings", "why_not_updated"]

_EMBEDDINGS = ("sglang.srt.managers.mm_schedule", "sglang.srt.managers.mm_utils")
"""Where `embedding_cache` is in 0.5.23, and where it was before."""

_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater"


def why_not_updated(models: Sequence[Any]) -> str:
    """Why SGLang updates none of these models: copies of their weights, in CUDA graphs, that no loader renews. "" if it
    does, and of versions that do not tell.

    Every update of its own asks the same first.
    """
    ask = getattr(sys.modules.get(_UPDATER), "_unsupported_derived_weight_cache_error", None)
    if ask is None:
        return ""
    of_models = len(inspect.signature(ask).parameters) > 0  # at first it was told no model
    reasons = (ask(model) if of_models else ask() for model in models)
    return next((str(reason) for reason in reasons if reason), "")


def forget_embeddings() -> None:
    """Empty this scheduler's cache of image embeddings: its key is the image alone, and `/flush_cache` leaves it."""
    for module in _EMBEDDINGS:
        clear = getattr(getattr(sys.modules.get(module), "embedding_cache", None), "clear", None)
        if clear is not None:
            clear()
