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

The rules are plain functions over one `PushState`, in a module for each part of a push: `opening`, `drawing`,
`transferring`, `committing`, `ending`, and `failing` for whenever. A rule notes what was heard, and asks for what
follows from that alone. Then `go_on` asks for whatever has become possible: no rule has to know what waited for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsync.session import promises
from weightsync.session.committing import begin_commit, commit_on
from weightsync.session.drawing import draw
from weightsync.session.ending import end_when_all_ended
from weightsync.session.opening import open_on, probe
from weightsync.session.slots import free_slots, grant
from weightsync.session.state import PushState, State
from weightsync.session.tracks import EngineStage
from weightsync.session.transferring import load, relay
from weightsync.session.transitions import TRANSITIONS
from weightsync.session.words import waited_for

if TYPE_CHECKING:
    from weightsync.session.events import Event
    from weightsync.session.instructions import Instruction

__all__ = ["TRANSITIONS", "PushSession", "State"]


class PushSession(PushState):
    """One push of one version of one model by one group of trainer ranks.

    After construction, carry out `start(now)`; then give every event to `handle` and carry out what it returns. Call
    `handle(Tick(), now)` when `deadline()` is reached.
    """

    def start(self, now: float) -> list[Instruction]:
        """Probe the engines while ranks arrive."""
        self.started = self.now = now
        self.out = []
        probe(self)
        return self.out

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Hear one event. A duplicate or late one changes nothing."""
        rule, follows = TRANSITIONS[self.state, type(event)]
        before = self.state
        self.now, self.out = now, []
        rule(self, event)
        go_on(self)
        if self.state is not before and self.state not in follows:
            raise AssertionError(f"{before} + {type(event).__name__} → {self.state} is not in the table")
        return self.out

    def waiting_for(self) -> str:
        """What keeps the push from going on, in words, for errors and status."""
        return waited_for(self)[0]

    def validate(self) -> None:
        """Raise AssertionError if a promise does not hold; cheap enough to call after each event in tests."""
        promises.check(self)


def go_on(push: PushState) -> None:
    """Ask for whatever has become possible; a second time, without another event, there is nothing."""
    free_slots(push)
    if push.state is State.OPENING:
        open_on(push)
    if push.state is State.TRANSFERRING:  # perhaps just now, and so below
        transfer_on(push)
    if push.state is State.COMMITTING:
        commit_on(push)


def transfer_on(push: PushState) -> None:
    """Slots and relays in bucket order, and each engine by itself: by buckets, or without. Once all that are left have
    everything: commit.
    """
    if not push.worth_it():
        end_when_all_ended(push)
        return
    live = push.live()
    drawing = any(engine.draws and not push.has_all(engine) for engine in live)
    if not (drawing or push.delivering or all(engine.draws for engine in live)):
        grant(push)  # not before: an engine that finds that it cannot draw needs every bucket
    relay(push)
    for engine in live:
        if engine.asked is None:
            (draw if engine.draws else load)(push, engine)
    loaded = all(engine.stage is EngineStage.LOADING and push.has_all(engine) for engine in live)
    measured = not (push.unmeasured and any(engine.draws for engine in live))
    if loaded and measured and not push.delivering:  # a delivery to one that was lost reads the weights still
        begin_commit(push)
