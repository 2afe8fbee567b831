"""One folder per engine brand; each `control.py` is the daemon's hand, each `plugin.py` runs in the engine's worker.

    from weightsync.adapters import adapter
    hand = adapter(spec)        # spec.kind says which brand

A brand's modules are imported when its first adapter is made, so that a daemon loads nothing it does not need.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from weightsync.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightsync.adapters.base import EngineAdapter

__all__ = ["KINDS", "EngineSpec", "adapter"]


class EngineSpec(Protocol):
    """What an adapter must know of its engine. The daemon's configuration provides it."""

    @property
    def kind(self) -> str:
        """Which brand: a key of `KINDS`."""

    @property
    def name(self) -> str:
        """What the operator calls it; unique in a node."""

    @property
    def url(self) -> str:
        """Where it answers, such as `http://127.0.0.1:8000`."""

    @property
    def api_key(self) -> str | None:
        """Its bearer key; never logged, never in a repr."""


KINDS: dict[str, tuple[str, str]] = {
    "reference": ("weightsync.adapters.reference.control", "ReferenceAdapter"),
}
"""Kind of engine → the module and class of its adapter."""


def adapter(spec: EngineSpec) -> EngineAdapter:
    """The adapter for one engine; connects to nothing yet. Raises `ConfigError` for a kind that is not known."""
    found = KINDS.get(spec.kind)
    if found is None:
        raise ConfigError(
            f"engine {spec.name!r} is of kind {spec.kind!r}, which has no adapter",
            engine=spec.name,
            hint=f"one of: {', '.join(sorted(KINDS))}",
        )
    module, name = found
    make: Callable[[EngineSpec], EngineAdapter] = getattr(import_module(module), name)
    return make(spec)
