"""The section of a node config about one engine. Messages carry it too."""

from __future__ import annotations

import os
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

__all__ = ["EngineConfig", "Name"]

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[[engines]]: one inference server on this node."""

    name: Name
    kind: str
    url: str
    model: Name = "default"
    api_key_env: str | None = None  # environment variable that holds its bearer key
    ca_file: str | None = None  # certificates (PEM) for an https URL, if the system's do not suffice
    path: str = "auto"  # path into the engine, see PATHS
    target: Literal["all", "model", "draft"] = "all"  # which of its models takes the pushed weights
    gpus: tuple[str, ...] = ()  # UUIDs of its ranks' GPUs, if its process cannot be inspected
    frozen: bool = False  # watched, and never pushed to: a reference or a reward model

    @property
    def api_key(self) -> str | None:
        """The key itself; read when needed, never stored."""
        return os.environ.get(self.api_key_env) if self.api_key_env else None
