"""The rules of one push.

`PushSession.handle(event, now)` answers with instructions; the daemon carries them out and every outcome, failures and
deadlines included, comes back as an event. `TRANSITIONS` is the whole of it: one row for each state and event says
which rule decides and which states may follow; the diagram in docs/ is drawn from it.

    OPENING        ranks arrive, engines are probed, the plan is made, every engine accepts the manifest
    TRANSFERRING   engines are paused, slots leased, filled, exported, relayed and loaded
    COMMITTING     everything is loaded: engines finish, verify, let go of slots, and, when all have, resume together
    COMMITTED      every engine that was not evicted on the way serves the new version
    ABORTED        ended with no engine touched
    TORN           ended with at least one engine touched; `torn` lists those that are left so

Three rules hold throughout. An engine is *touched* from the moment `BeginEngine` is issued; a touched engine that
does not commit is torn and is never resumed. A slot is leased again only when its fillers have reported and each of
its readers has released it or was evicted. And one failing engine is evicted while the others go on; the push itself
fails only when a trainer rank, the bytes or the last engine is gone, or an engine refuses what was asked.

After the end (`ended`) outcomes still under way are awaited, for `grace` seconds at most; then the session is `done`
and the slots are free for the next push.

The rules are in one module for each part of a push, each a class on top of what it builds on:

    state → ending → committing → transferring → drawing → opening → failing → PushSession
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsync.session.failing import Failing
from weightsync.session.state import State
from weightsync.session.transitions import TRANSITIONS

if TYPE_CHECKING:
    from weightsync.session.events import Event
    from weightsync.session.instructions import Instruction

__all__ = ["TRANSITIONS", "PushSession", "State"]


class PushSession(Failing):
    """One push of one version of one model by one group of trainer ranks.

    After construction, carry out `start(now)`; then give every event to `handle` and carry out what it returns. Call
    `handle(Tick(), now)` when `deadline()` is reached.
    """

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Hear one event. A duplicate or late one changes nothing."""
        rule, follows = TRANSITIONS[self.state, type(event)]
        before = self.state
        out: list[Instruction] = []
        rule(self, event, now, out)
        if self.state is not before and self.state not in follows:
            raise AssertionError(f"{before} + {type(event).__name__} → {self.state} is not in the table")
        return out
