"""The session of one push: turns events into instructions.

`PushSession.handle(event, now)` returns instructions. The daemon carries them out, and reports every outcome as an
event, failures and deadlines included. `TRANSITIONS` has one row for each state and event: the rule that decides, and
the states that may follow. The diagram in docs/ is drawn from it.

    OPENING        ranks arrive, engines are probed, the plan is made, every engine accepts the manifest
    TRANSFERRING   engines are paused, slots leased, filled, exported, relayed and loaded
    COMMITTING     everything is loaded: engines finish, verify and release slots; when all have, they resume together
    COMMITTED      every engine that was not evicted on the way serves the new version
    ABORTED        ended with no engine touched
    TORN           ended with at least one engine touched; `torn` lists the engines that are left torn

Three rules hold throughout. An engine is *touched* from the moment `BeginEngine` is issued; a touched engine that
does not commit is torn and is never resumed. A slot is leased again only when its fillers have reported and each of
its readers has released it or was evicted. If one engine fails, it is evicted and the others go on. The push itself
fails only if it is refused or stopped, if a trainer rank, the bytes or the last engine is gone, or if time is up.

After the end (`ended`) the session waits for outcomes still under way, for `operation_timeout + grace` seconds at most.
Then it is `done`, and the slots are free for the next push.

The rules are plain functions over one `PushState`. Each part of a push has a module of rules: `opening`, `drawing`,
`transferring`, `committing` and `ending`; `failing` has the rules for failures at any time. A rule notes the event and
issues the instructions that follow from it alone. Then `go_on` issues all instructions that have become possible, so
that no rule has to know which work waited for it.
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

    After construction, carry out the instructions that `start(now)` returns. Then give every event to `handle`, and
    carry out the instructions that it returns. Call `handle(Tick(), now)` when `deadline()` is reached.
    """

    def start(self, now: float) -> list[Instruction]:
        """Probe the engines while ranks arrive."""
        self.started = self.now = now
        self.out = []
        probe(self)
        return self.out

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Handle one event. An event that nothing waits for, such as a duplicate, changes nothing."""
        rule, follows = TRANSITIONS[self.state, type(event)]
        before = self.state
        self.now, self.out = now, []
        rule(self, event)
        go_on(self)
        if self.state is not before and self.state not in follows:
            raise AssertionError(f"{before} + {type(event).__name__} → {self.state} is not in the table")
        return self.out

    def waiting_for(self) -> str:
        """Say in words what the push waits for, for errors and status."""
        return waited_for(self)[0]

    def validate(self) -> None:
        """Raise AssertionError if a promise does not hold; cheap enough to call after each event in tests."""
        promises.check(self)


def go_on(push: PushState) -> None:
    """Issue all instructions that have become possible. A second call without another event issues none."""
    free_slots(push)
    if push.state is State.OPENING:
        open_on(push)
    if push.state is State.TRANSFERRING:  # `open_on` may just have changed the state, as `transfer_on` may below
        transfer_on(push)
    if push.state is State.COMMITTING:
        commit_on(push)


def transfer_on(push: PushState) -> None:
    """Lease slots and relay buckets in order, and let each engine draw or load. Commit once all have everything."""
    if not push.worth_it():
        end_when_all_ended(push)
        return
    live = push.live()
    drawing = any(engine.draws and not push.has_all(engine) for engine in live)
    if not (drawing or push.delivering or all(engine.draws for engine in live)):
        grant(push)  # not earlier: an engine that turns out to be unable to draw needs every bucket
    relay(push)
    for engine in live:
        if engine.asked is None:
            (draw if engine.draws else load)(push, engine)
    loaded = all(engine.stage is EngineStage.LOADING and push.has_all(engine) for engine in live)
    measured = not (push.unmeasured and any(engine.draws for engine in live))
    if loaded and measured and not push.delivering:  # a delivery reads the weights even after its engine was lost
        begin_commit(push)
