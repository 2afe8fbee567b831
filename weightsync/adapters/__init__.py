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

__all__ = ["KINDS", "PATHS", "EngineSpec", "adapter"]


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

    @property
    def ca_file(self) -> str | None:
        """Certificates (PEM) that an https URL is checked against; None: those of the system."""

    @property
    def path(self) -> str:
        """Which way into the engine: one that its brand knows, or "auto" for the best that it offers."""

    @property
    def gpus(self) -> tuple[str, ...]:
        """UUIDs of its ranks' GPUs, where they cannot be told from its process; else empty."""

    @property
    def target(self) -> str:
        """Which of its models takes what is pushed: "all", "model" or "draft"."""


KINDS: dict[str, tuple[str, str]] = {
    "reference": ("weightsync.adapters.reference.control", "ReferenceAdapter"),
    "sglang": ("weightsync.adapters.sglang.control", "SGLangAdapter"),
    "vllm": ("weightsync.adapters.vllm.control", "VLLMAdapter"),
}
"""Kind of engine → the module and class of its adapter."""

PATHS: dict[str, tuple[str, ...]] = {
    "reference": ("auto",),
    "sglang": ("auto", "plugin", "tensor", "ipc", "group"),
    "vllm": ("auto", "plugin", "extension", "ipc", "group"),
}
"""Kind of engine → the ways into it, see docs/engines.md."""


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
