"""Waiting for GPUs, with a deadline."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from weightsync.errors import TransportTimeout

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

__all__ = ["await_events"]

_GLANCE = 50e-6  # seconds between two looks at a GPU


def await_events(events: Iterable[torch.cuda.Event | torch.cuda.Stream], what: str, *, deadline: float) -> None:
    """Wait until all events have come. Raises `TransportTimeout` naming `what`."""
    pause = threading.Event()
    for event in events:
        while not event.query():
            if time.monotonic() >= deadline:
                raise TransportTimeout(f"{what} is still under way on this rank's GPU")
            pause.wait(_GLANCE)
