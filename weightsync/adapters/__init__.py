"""One folder for each brand of engine: its `control.py` runs in the daemon, its `plugin.py` in the engine's workers.

    from weightsync.adapters import adapter
    hand = adapter(spec)        # spec.kind says which brand

A brand's modules are imported when its first adapter is made, so that a daemon loads only what it needs.
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
    """The facts that an adapter must know about its engine; the daemon's configuration provides them."""

    @property
    def kind(self) -> str:
        """The brand: a key of `KINDS`."""

    @property
    def name(self) -> str:
        """The operator's name for it, unique in a node."""

    @property
    def url(self) -> str:
        """The address it answers at, such as `http://127.0.0.1:8000`."""

    @property
    def api_key(self) -> str | None:
        """Its bearer key, which appears in no log and no repr."""

    @property
    def ca_file(self) -> str | None:
        """File of certificates (PEM) that an https URL is checked against; None: the system's."""

    @property
    def path(self) -> str:
        """The path into the engine: one of its brand's `PATHS`; "auto" takes the best one that the engine offers."""

    @property
    def gpus(self) -> tuple[str, ...]:
        """UUIDs of its ranks' GPUs, by tp_rank; empty if the engine's process tells which they are."""

    @property
    def target(self) -> str:
        """The model of the engine that takes the pushed weights: "all", "model" or "draft"."""


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
"""Kind of engine → the paths into it; docs/engines.md describes them."""


def adapter(spec: EngineSpec) -> EngineAdapter:
    """Make the adapter for one engine, without connecting yet. Raises `ConfigError` if the kind is unknown."""
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
