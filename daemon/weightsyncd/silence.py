"""Whether a trainer rank of this node that has fallen silent is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsync.processes import at_work

if TYPE_CHECKING:
    from weightsync.wire import messages as msg

__all__ = ["is_lost"]

_BUSY = 3  # times `timeouts.liveness` for one that is there


def is_lost(silent: float, liveness: float, call: msg.Open) -> bool:
    """Of the rank of this call, which has not been heard for `silent` seconds. One whose process is there, and was not
    stopped, is held up in something that keeps Python's other threads from running, such as a library that comes from
    a slow disk: it has longer. Where the process is not to be seen, silence is all that tells.
    """
    if silent <= liveness:
        return False
    return silent > _BUSY * liveness or not at_work(call.pid, call.started)
