"""The state of one push. Only the rules, which are functions over it, change it.

While an event is handled, `now` is its time and `out` holds the instructions issued so far.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from weightsync.session.tracks import BucketTrack, Copy, EngineStage, EngineTrack, PhaseClock

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Container, Mapping

    from weightsync.errors import ErrorRecord
    from weightsync.session.instructions import Instruction

__all__ = ["PushState", "State"]


class State(StrEnum):
    """Where a push stands; see `machine`. In the last three states it has ended."""

    OPENING = "opening"
    TRANSFERRING = "transferring"
    COMMITTING = "committing"
    COMMITTED = "committed"
    ABORTED = "aborted"
    TORN = "torn"

    @property
    def ended(self) -> bool:
        return self in _ENDED


_ENDED = frozenset({State.COMMITTED, State.ABORTED, State.TORN})


class PushState:
    """Everything that is remembered of a push, and the questions that can be asked about it."""

    def __init__(
        self,
        *,
        model: str,
        version: int,
        world: int,
        home: str,
        engines: Mapping[str, str],
        slots: Mapping[tuple[str, int], int],
        pause: str,
        deadline: float,
        operation_timeout: float,
        grace: float,
        last_version: int | None,
        keepers: Container[str],
    ) -> None:
        """`engines` maps each engine's name to its node. `slots` maps (node, bridge) to its number of slots, for the
        home node at least. `keepers` are the engines that only keep the push; they keep nothing that no engine serves.
        """
        self.model, self.version, self.world, self.home, self.pause = model, version, world, home, pause
        self.push_deadline = deadline
        self.operation_timeout = operation_timeout
        self.grace = grace
        self.last_version = last_version
        # progress
        self.state = State.OPENING
        self.error: ErrorRecord | None = None
        self.started = self.finished = 0.0
        self.drain_until: float | None = None  # once ended: until when outcomes are awaited
        self.abandoned = False  # outcomes are not awaited any more
        self.phases = PhaseClock()
        self.nbytes = 0  # of the whole plan
        self.filled_bytes = 0
        # ranks, and their plan
        self.opened: set[int] = set()
        self.rank_nodes: dict[int, str] = {}
        self.awaited_layouts: set[int] = set()
        self.planning = self.planned = False
        self.partial = False  # a rank was told to leave tensors out
        self.in_place: set[int] = set()  # ranks whose weights may be read where they lie
        self.unexposed: set[int] = set()  # ranks that were asked where their weights lie, and have not answered
        self.unmeasured: set[int] = set()  # ranks whose fingerprints of these weights have not come
        # engines and nodes
        self.engines = {name: EngineTrack(name, node, keeper=name in keepers) for name, node in engines.items()}
        self.nodes: set[str] = {home, *engines.values()}  # and the ranks' nodes, less those that have left
        self.rails_ready = False
        self.rails_number = 0  # of the `RailsFormed` that is waited for
        self.delivering: frozenset[str] = frozenset()  # nodes that bridges deliver to, through all slots there and here
        # buckets and slots
        self.buckets: list[BucketTrack] = []
        self.spread = False  # ranks on other nodes than home write: every node gets every bucket by an exchange
        self.ungranted: dict[int, deque[int]] = {}  # by bridge: buckets that wait for a slot, in order
        self.unrelayed: dict[int, deque[int]] = {}  # by bridge: buckets that wait for their broadcast, in order
        self.active: set[int] = set()  # buckets that lie in a slot somewhere
        self.capacity = dict(slots)
        self.free = {place: list(range(count)) for place, count in slots.items()}
        # of the event that is being handled: its time, and the answer so far
        self.now = 0.0
        self.out: list[Instruction] = []

    # --- what the daemon asks -----------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether the outcome is decided."""
        return self.state.ended

    @property
    def done(self) -> bool:
        """Whether it has ended and none of its work is under way: the next push may use engines and slots."""
        return self.ended and (self.abandoned or not self._outstanding())

    @property
    def fleet(self) -> list[EngineTrack]:
        """Engines that serve: all but keepers."""
        return [e for e in self.engines.values() if not e.keeper]

    @property
    def torn(self) -> tuple[str, ...]:
        return tuple(e.name for e in self.fleet if e.stage is EngineStage.TORN)

    @property
    def committed(self) -> tuple[str, ...]:
        return tuple(e.name for e in self.fleet if e.stage is EngineStage.COMMITTED)

    def taken(self, node: str, bridge: int) -> int:
        """Return how many slots of a bridge hold a bucket."""
        place = (node, bridge)
        return self.capacity[place] - len(self.free[place]) if place in self.capacity else 0

    def deadline(self) -> float | None:
        """Return when `Tick` is due; None once done."""
        if self.done:
            return None
        return self.drain_until if self.ended else self.push_deadline

    def _outstanding(self) -> bool:
        return bool(self.active) or bool(self.delivering) or any(e.asked for e in self.engines.values())

    # --- what the rules ask, and what they answer with ---------------------------------------------------------------

    def issue(self, instruction: Instruction) -> None:
        """Add an instruction to the answer to the event that is being handled."""
        self.out.append(instruction)

    def until(self) -> float:
        """Return the deadline of an operation that begins now."""
        return min(self.push_deadline, self.now + self.operation_timeout)

    def live(self) -> list[EngineTrack]:
        """Return the engines that may still commit, keepers included."""
        return [e for e in self.engines.values() if not e.stage.ended]

    def worth_it(self) -> bool:
        """Return whether an engine that is no keeper may still commit."""
        return any(not e.stage.ended for e in self.fleet)

    def has_all(self, engine: EngineTrack) -> bool:
        """Return whether the engine has loaded everything."""
        return engine.asked is None and engine.loaded == len(self.buckets)

    def remote_nodes(self) -> list[str]:
        return sorted(self.nodes - {self.home})

    def receivers(self) -> list[str]:
        """Return the nodes that buckets are sent to: all remote nodes, or none.

        It is none if only home's ranks write and no remote engine takes buckets. It is never some of them, so that
        communicators stay as they are.
        """
        taken = self.spread or any(e.node != self.home and not e.draws for e in self.live())
        return self.remote_nodes() if taken else []

    def ranks_on(self, node: str) -> list[int]:
        return sorted(rank for rank, place in self.rank_nodes.items() if place == node)

    def copy(self, bucket: int, node: str) -> Copy | None:
        """Return the bucket's copy in a slot of the node, or None."""
        return self.buckets[bucket].copies.get(node) if 0 <= bucket < len(self.buckets) else None

    def held(self) -> set[tuple[str, int]]:
        """Return (engine, bucket) for each bucket that was exported to the engine and is not yet released by it."""
        return {(e, i) for i in self.active for copy in self.buckets[i].copies.values() for e in copy.readers}
