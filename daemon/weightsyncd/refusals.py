"""Calls of `push_weights` that come to nothing: refused, too late, given up, or of a push that failed without them."""

from __future__ import annotations

import logging
import secrets
import time
from typing import TYPE_CHECKING

from weightsync.errors import ErrorRecord, PushAborted, PushRefused, PushTimeout
from weightsync.session.words import rank_failed
from weightsync.wire import messages as msg
from weightsyncd.failures import Failures
from weightsyncd.metrics import UNKNOWN
from weightsyncd.push_engines import engines_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from weightsyncd.metrics import Metrics
    from weightsyncd.push import Push, Services
    from weightsyncd.waiting import Call

__all__ = ["Refusals"]

logger = logging.getLogger(__name__)


class Refusals:
    """Tells each rank why, and its siblings, which would wait for it."""

    def __init__(
        self,
        services: Services,
        metrics: Metrics,
        *,
        leads: Callable[[msg.Open], bool],
        on_siblings_told: Callable[[], None],
    ) -> None:
        """`leads` says whether a rank's node coordinates its push. `on_siblings_told` is called when calls that wait
        here may have failed with one that did.
        """
        self.last: ErrorRecord | None = None  # of rank 0's last call that failed before it became a push
        self.last_at = 0.0
        self.failures = Failures()
        self._services = services
        self._metrics = metrics
        self._leads = leads
        self._on_siblings_told = on_siblings_told

    def refuse(self, call: Call, reason: str, hint: str | None) -> None:
        """Nothing was touched, and the trainer may try again."""
        message = call.message
        words = (message.model, message.version, reason)
        logger.warning("[model=%s v=%d] refused: %s", *words, extra={"rank": message.rank})
        self._end(call, PushRefused(reason, model=message.model, version=message.version, hint=hint).record())

    def time_is_up(self, call: Call, what: str) -> None:
        """The call has waited for its whole timeout, for `what`."""
        message = call.message
        reason = f"the push did not start within {message.timeout:g} s; it was waiting for {what}"
        self._end(call, PushTimeout(reason, model=message.model, version=message.version, phase="open").record())

    def fell_silent(self, call: Call, liveness: float) -> None:
        """Drop a call whose rank is gone, by all signs: a push that began with it would find no rank."""
        message, reason = call.message, f"it was not heard for {liveness:g} s while it waited for the node to be free"
        model, version, rank = message.model, message.version, message.rank
        logger.warning("[model=%s v=%d] rank %d: %s", model, version, rank, reason, extra={"rank": rank})
        error = PushAborted(reason, model=model, version=version, rank=rank, phase="open").record()
        self._siblings_hear(call, error)
        self._end(call, error)

    def gave_up(self, call: Call, error: ErrorRecord) -> None:
        """A rank that waited has failed."""
        told = rank_failed(call.message.rank, error)
        self._siblings_hear(call, told)
        self._end(call, told)

    def failed_without(self, call: Call) -> bool:
        """Tell the rank if the push that it calls for has failed already. Returns whether it has."""
        error = self.failures.tell(call.message)
        if error is not None:
            self._services.send(call.identity, msg.Ended(id=call.message.id, error=error))
        return error is not None

    def push_failed(self, push: Push, error: ErrorRecord) -> None:
        """Note a push of this node that has failed: ranks that have not called yet are told when they do."""
        if not push.ranks.complete:
            session = push.session
            until = min(session.push_deadline, session.finished + self._services.config.timeouts.operation)
            self.failures.note(push.call, push.ranks, error, until=until)

    def missed(self, call: msg.Gather, ranks: Collection[int], error: ErrorRecord) -> None:
        """Note a push from elsewhere that has failed, perhaps before all `ranks` of this node had called."""
        self.failures.note(call, ranks, error, until=self._later())

    def _end(self, call: Call, error: ErrorRecord) -> None:
        """End a call. With rank 0's call end those of its siblings, which wait for it here and elsewhere."""
        message = call.message
        self._services.send(call.identity, msg.Ended(id=message.id, error=error))
        if message.rank == 0 and not message.engines:  # a keeper tries again
            self.last, self.last_at = error, time.monotonic()
            model = message.model if engines_of(self._services, message.model) else UNKNOWN
            self._metrics.push_failures.labels(model, error.kind).inc()
        if message.rank != 0 or message.world == 1:
            return
        self.failures.note(message, {0}, error, until=self._later())
        push = f"{self._services.config.node.name}-{secrets.token_hex(8)}"
        summons = msg.Gather(push=push, group=message.group, model=message.model, version=message.version)
        for peer in self._services.peers.values():
            if peer.info is not None:
                peer.tell(summons)
                peer.tell(msg.Release(push=push, error=error))
        self._on_siblings_told()

    def _siblings_hear(self, call: Call, error: ErrorRecord) -> None:
        if not self._leads(call.message):
            self.failures.note(call.message, {call.message.rank}, error, until=self._later())

    def _later(self) -> float:
        """Until when a rank may be on its way to a push that its siblings have called for."""
        return time.monotonic() + self._services.config.timeouts.operation
