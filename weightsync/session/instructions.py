"""What a session answers: things to do. Each is carried out by the daemon's dispatcher and ends in exactly one event.

Every instruction that waits for somebody else carries `deadline`, absolute seconds on the clock that `handle(…, now)`
was given. An instruction past its deadline ends in the event that says so (`EngineFailed`, `BridgeLost`, …).
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from weightsync.errors import ErrorRecord

MOST_LOADED = 8  # buckets in one call, which has the time of one operation
SLOWEST = 1e9  # bytes a second: a delivery, which is of a whole model, is given so much time, and slower wires buckets
__all__ = [
    "MOST_LOADED",
    "SLOWEST",
    "AcceptEngine",
    "AnnouncePlan",
    "AskLayout",
    "AwaitRelease",
    "BeginEngine",
    "DeliverWeights",
    "DrawWeights",
    "EndPush",
    "ExchangeBucket",
    "ExportBucket",
    "FinishEngine",
    "FormRails",
    "GrantLease",
    "Instruction",
    "LoadBucket",
    "MakePlan",
    "PauseEngine",
    "ProbeEngine",
    "RelayBucket",
    "ReleaseWeights",
    "ResumeEngine",
    "RetireBridge",
    "RevokeBucket",
    "ShowPlaces",
    "Slot",
    "VerifyEngine",
]


class Slot(msgspec.Struct, frozen=True):
    """One bucket-sized piece of the arena of one bridge of one node."""

    node: str
    bridge: int
    index: int


class Instruction(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of everything a session answers."""

    deadline: float = 0.0


# --- towards the trainer ranks; these end at once, in no event ---------------------------------------------------


class AskLayout(Instruction, frozen=True):
    """Ask the rank for its layout. Ends in `LayoutReceived`."""

    rank: int


class AnnouncePlan(Instruction, frozen=True):
    """Send every rank the manifest (where it has it not), what it fills, and the offers of the arenas. `expose`: each
    is also to say where its weights lie; ends in one `RankExposed` and, where that went well, one `RankMeasured` each.
    """

    expose: bool = False


class GrantLease(Instruction, frozen=True):
    """`ranks`, all on the slot's node, may write their parts of the bucket into it. Ends in one `RankFilled` each."""

    bucket: int
    slot: Slot
    ranks: tuple[int, ...]


class ReleaseWeights(Instruction, frozen=True):
    """Tell every rank that nobody reads what it exposes any more."""


class EndPush(Instruction, frozen=True):
    """Tell every rank the outcome: the report, or the error that is raised on all of them alike."""

    error: ErrorRecord | None = None


# --- planning -----------------------------------------------------------------------------------------------------


class MakePlan(Instruction, frozen=True):
    """Plan the layouts of all ranks. Ends in `PlanMade`, `PlanFailed` or `LayoutsMissing`."""


class FormRails(Instruction, frozen=True):
    """See that the communicator reaches `nodes`. Ends in `RailsFormed` of the same number."""

    nodes: tuple[str, ...]
    number: int


# --- towards engines: end in the event of the same name in the past tense, or in `EngineFailed` ------------------


class ProbeEngine(Instruction, frozen=True):
    """Ask the engine who it is and what it serves."""

    engine: str


class AcceptEngine(Instruction, frozen=True):
    """Show the engine the manifest, so that it can refuse before anything is touched."""

    engine: str


class PauseEngine(Instruction, frozen=True):
    """Stop generation, as `mode` says."""

    engine: str
    mode: str


class BeginEngine(Instruction, frozen=True):
    """Open the update. From here on a failure leaves the engine torn."""

    engine: str


class DrawWeights(Instruction, frozen=True):
    """Have the engine read what it needs out of the memory that the trainer's ranks expose. Ends in `WeightsDrawn`."""

    engine: str


class ShowPlaces(Instruction, frozen=True):
    """Have the engine, which is on another node than the trainer, show where it has places for what it needs. Ends in
    `PlacesShown`.
    """

    engine: str


class LoadBucket(Instruction, frozen=True):
    """Hand each tensor-parallel rank of the engine its tickets for the bucket, and for those after it, `count` in all.
    Ends in one `BucketLoaded` of the same.
    """

    engine: str
    bucket: int
    count: Annotated[int, msgspec.Meta(ge=1, le=MOST_LOADED)] = 1


class AwaitRelease(Instruction, frozen=True):
    """Wait for the fence of this engine's readers. Ends in `BucketReleased`, with `leaked` once the deadline passed."""

    engine: str
    bucket: int


class FinishEngine(Instruction, frozen=True):
    """Everything is loaded: post-process, flush, set the version."""

    engine: str


class VerifyEngine(Instruction, frozen=True):
    """Compare what lies in the engine's memory with what the trainer sent."""

    engine: str


class ResumeEngine(Instruction, frozen=True):
    """Serve again."""

    engine: str


# --- on the wire ---------------------------------------------------------------------------------------------------


class ExportBucket(Instruction, frozen=True):
    """Checksum the whole bucket in the slot and export it once for each reader of `engines` on that node.

    Ends in `BucketExported` or `BridgeLost`.
    """

    bucket: int
    slot: Slot
    nbytes: int
    engines: tuple[str, ...]


class RelayBucket(Instruction, frozen=True):
    """Broadcast the bucket from the slot into the slots of other nodes. Ends in `BucketRelayed` or `BridgeLost`."""

    bucket: int
    slot: Slot
    nbytes: int
    targets: tuple[Slot, ...]


class ExchangeBucket(Instruction, frozen=True):
    """Ranks of several nodes have written parts of the bucket, each into its own node's slot of `slots`: have the
    bridges give them to one another, so that all have it whole. Ends in `BucketRelayed`, which names home, too.
    """

    bucket: int
    slots: tuple[Slot, ...]


class DeliverWeights(Instruction, frozen=True):
    """Have the bridges bring what these engines have places for, each on its node of `nodes`, out of the memory that
    the trainer's ranks expose straight into these places. Ends in `WeightsDelivered`.
    """

    engines: tuple[str, ...]
    nodes: tuple[str, ...]


class RevokeBucket(Instruction, frozen=True):
    """The engine is out: take its readers' hold on the bucket away. Ends in no event."""

    engine: str
    bucket: int


class RetireBridge(Instruction, frozen=True):
    """Somebody who cannot be reached may still write into this bridge's arena: replace both. Ends in no event."""

    node: str
    bridge: int
    reason: str
