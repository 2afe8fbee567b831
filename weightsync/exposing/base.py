"""What exposing comes to, wherever weights lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from weightsync.plan.exposure import Exposure

__all__ = ["Exposing"]


class Exposing(Protocol):
    """Of one push."""

    exposure: Exposure

    @property
    def ready(self) -> bool:
        """Whether engines may read."""

    @property
    def measured(self) -> dict[int, int] | None:
        """Tensor of the manifest → fingerprint of what this rank exposes of it; None until that is known."""

    def advance(self) -> None:
        """Go on a little. Raises `SourceError`, or `TransportBroken` for an error of the GPU."""

    def close(self, *, deadline: float) -> None:
        """Wait for what is under way; nothing is done after this. Raises `TransportTimeout`."""
