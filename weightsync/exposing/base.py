"""The protocol of exposing, for host memory and GPUs alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from weightsync.plan.exposure import Exposure

__all__ = ["Exposing"]


class Exposing(Protocol):
    """The exposing of one push."""

    exposure: Exposure

    @property
    def ready(self) -> bool:
        """Whether engines may read."""

    @property
    def measured(self) -> dict[int, int] | None:
        """Tensor of the manifest → fingerprint of what this rank exposes of it; None until all are known."""

    def advance(self) -> None:
        """Do the next bit of work. Raises `SourceError`, or `TransportBroken` for an error of the GPU."""

    def close(self, *, deadline: float) -> None:
        """Wait for the work under way, and do none afterwards.

        Raises `TransportTimeout`, or `TransportBroken` for an error of the GPU.
        """
