"""Events: what a session hears. Each is a fact: a trainer rank's message, an instruction's outcome, or a loss.

Events name things by id and count bytes; they hold no tensor. They are plain data, because a follower node sends the
outcomes of its instructions to the coordinating node in this same form.
"""

from __future__ import annotations

import msgspec

from weightsync.errors import ErrorRecord

__all__ = [
    "BridgeLost",
    "BucketExported",
    "BucketLoaded",
    "BucketPlan",
    "BucketRelayed",
    "BucketReleased",
    "EngineAccepted",
    "EngineBegun",
    "EngineFailed",
    "EngineFinished",
    "EnginePaused",
    "EngineProbed",
    "EngineResumed",
    "EngineVerified",
    "Event",
    "LayoutReceived",
    "LayoutsMissing",
    "NodeLost",
    "PlacesShown",
    "PlanFailed",
    "PlanMade",
    "RailsFormed",
    "RankExposed",
    "RankFailed",
    "RankFilled",
    "RankLost",
    "RankMeasured",
    "RankOpened",
    "RankStopped",
    "StopRequested",
    "Tick",
    "WeightsDelivered",
    "WeightsDrawn",
]


class Event(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all events."""


# --- from the trainer ranks ---------------------------------------------------------------------------------------


class RankOpened(Event, frozen=True):
    """A rank wants to push and says what it holds, by digest."""

    rank: int
    layout: bytes  # digest of its layout
    node: str = ""  # where it runs; "" means home
    slots: tuple[int, ...] = ()  # slots of each bridge of that node, unless it is home
    describe_seconds: float = 0.0
    in_place: bool = False  # engines may read its weights where they lie
    partial: bool = False  # it was told to leave tensors out


class LayoutReceived(Event, frozen=True):
    """The layout asked for has arrived and is well-formed."""

    rank: int


class RankFilled(Event, frozen=True):
    """The rank has written all its parts of the bucket; its writes are visible to readers (its fence has passed)."""

    rank: int
    bucket: int
    nbytes: int  # bytes it wrote


class RankExposed(Event, frozen=True):
    """The rank has said where its weights lie, and they can be read there, unless there is a `problem`."""

    rank: int
    problem: str = ""  # why they cannot be read


class RankMeasured(Event, frozen=True):
    """The rank has sent the fingerprints of all the weights that it exposes."""

    rank: int
    nbytes: int  # bytes that it exposes


class RankFailed(Event, frozen=True):
    """The rank cannot go on (an exception, or Ctrl-C) and will write nothing more."""

    rank: int
    error: ErrorRecord


class RankLost(Event, frozen=True):
    """The rank was not heard of for too long. It may still be alive and writing."""

    rank: int
    reason: str


class RankStopped(Event, frozen=True):
    """The rank has heard the outcome and will write nothing more."""

    rank: int


# --- outcomes of planning -----------------------------------------------------------------------------------------


class LayoutsMissing(Event, frozen=True):
    """No plan is cached for the ranks' layouts, and the layouts of `ranks` are not known."""

    ranks: tuple[int, ...]


class BucketPlan(msgspec.Struct, frozen=True):
    """What the session needs to know of one bucket."""

    nbytes: int
    owner: int  # index of the bridge in whose slot it is assembled, on every node with ranks that write
    fillers: tuple[int, ...]  # ranks that write at least one byte


class PlanMade(Event, frozen=True):
    """All layouts agree; this is the order of buckets."""

    buckets: tuple[BucketPlan, ...]


class PlanFailed(Event, frozen=True):
    """The layouts contradict each other, leave holes, or do not fit into slots."""

    error: ErrorRecord


class RailsFormed(Event, frozen=True):
    """The communicator reaches `nodes`. `failed` nodes are out of this push."""

    number: int  # of the instruction
    nodes: tuple[str, ...]
    failed: tuple[tuple[str, ErrorRecord], ...] = ()


# --- outcomes at engines ------------------------------------------------------------------------------------------


class EngineProbed(Event, frozen=True):
    """The engine answered: who it is and what it serves."""

    engine: str
    tp_size: int
    version: int | None
    paused: bool
    torn: bool


class EngineAccepted(Event, frozen=True):
    """The engine can take every tensor of the manifest."""

    engine: str
    not_pushed: int | None = 0  # how many of its own tensors are not in the manifest; None: it cannot tell
    needs_all: bool = False  # it is torn or asleep: tensors that are not pushed would belong to no version
    draws: bool = False  # it can read these weights where ranks of its node expose them, or show places for them


class EnginePaused(Event, frozen=True):
    """Generation stands still."""

    engine: str


class EngineBegun(Event, frozen=True):
    """An update is open on the engine: its weights are in our hands."""

    engine: str


class WeightsDrawn(Event, frozen=True):
    """The engine has stopped reading the trainer's memory."""

    engine: str
    drawn: bool  # it has read all that it needs; if not, it could not, and has to load buckets


class PlacesShown(Event, frozen=True):
    """The engine has shown its places, and bridges can write into them, unless there is a `problem`."""

    engine: str
    problem: str = ""  # why they cannot be written


class BucketLoaded(Event, frozen=True):
    """The engine answered that it loaded `count` buckets, beginning with `bucket`. It may still read their slots."""

    engine: str
    bucket: int
    count: int = 1  # as many as it was asked to load


class BucketReleased(Event, frozen=True):
    """The fence has passed: no reader of this engine holds the bucket's slot any more."""

    engine: str
    bucket: int
    leaked: bool = False  # the deadline passed first and the readers' hold was revoked
    damaged: bool = False  # a reader read back other bytes than were exported


class EngineFinished(Event, frozen=True):
    """Post-processing is done and the version is set; the engine is still paused."""

    engine: str


class EngineVerified(Event, frozen=True):
    """The engine's memory holds the trainer's weights, as far as the engine can compare them."""

    engine: str
    checked: int = 0  # tensors compared


class EngineResumed(Event, frozen=True):
    """The engine serves again."""

    engine: str


class EngineFailed(Event, frozen=True):
    """The instruction called `phase` failed on the engine; `lost` if the engine does not answer any more."""

    engine: str
    phase: str
    error: ErrorRecord
    lost: bool = False


# --- outcomes on the wire -----------------------------------------------------------------------------------------


class BucketExported(Event, frozen=True):
    """The bucket lies whole in the node's slot, is checksummed, and each local reader has its ticket."""

    bucket: int
    node: str


class BucketRelayed(Event, frozen=True):
    """The broadcast or exchange has ended: `nodes` hold the bucket, `failed` do not."""

    bucket: int
    nodes: tuple[str, ...]
    failed: tuple[tuple[str, ErrorRecord], ...] = ()


class WeightsDelivered(Event, frozen=True):
    """The bridges have delivered all that these engines need, unless there is a `problem`, and write no more."""

    engines: tuple[str, ...]
    problem: str = ""  # why they could not; some bytes may have been written


class BridgeLost(Event, frozen=True):
    """A bridge process died or was killed because it did not answer; its arena is gone."""

    node: str
    bridge: int
    error: ErrorRecord


class NodeLost(Event, frozen=True):
    """A follower node does not answer any more."""

    node: str
    error: ErrorRecord


# --- time and the operator ----------------------------------------------------------------------------------------


class Tick(Event, frozen=True):
    """Time has passed; sent when `PushSession.deadline()` is reached."""


class StopRequested(Event, frozen=True):
    """The daemon is stopping and has waited long enough, or its own work on the push failed unexpectedly."""

    reason: str
