"""Instructions: what a session answers, and the daemon carries out. Each class names the events that it ends in.

An instruction that waits for an engine or a bridge has a `deadline`, in absolute seconds on the clock of
`handle(…, now)`. Past its deadline it ends in the event for that failure (`EngineFailed`, `BridgeLost`, …).
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from weightsync.errors import ErrorRecord

MOST_LOADED = 8  # buckets in one call, because a call has the time of one operation
SLOWEST = 1e9  # bytes a second: a delivery of the whole model has time for this rate; slower wires get buckets
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
    """One bucket-sized division of a bridge's arena."""

    node: str
    bridge: int
    index: int


class Instruction(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all instructions."""

    deadline: float = 0.0


# --- towards the trainer ranks: messages, and the events are the ranks' answers -----------------------------------


class AskLayout(Instruction, frozen=True):
    """Ask the rank for its layout. Ends in `LayoutReceived`."""

    rank: int


class AnnouncePlan(Instruction, frozen=True):
    """Send every rank the manifest (unless it has it), the parts that it fills, and the offers of the arenas.

    With `expose`, each rank is also asked where its weights lie. It answers with one `RankExposed` and, if that has no
    problem, one `RankMeasured`.
    """

    expose: bool = False


class GrantLease(Instruction, frozen=True):
    """Let `ranks`, all on the slot's node, write their parts of the bucket there. Ends in one `RankFilled` each."""

    bucket: int
    slot: Slot
    ranks: tuple[int, ...]


class ReleaseWeights(Instruction, frozen=True):
    """Tell every rank that the weights that it exposes are not read any more. Ends in no event."""


class EndPush(Instruction, frozen=True):
    """Tell every rank the outcome: the report, or the error that all of them raise. Ends in no event."""

    error: ErrorRecord | None = None


# --- planning -----------------------------------------------------------------------------------------------------


class MakePlan(Instruction, frozen=True):
    """Plan the layouts of all ranks. Ends in `PlanMade`, `PlanFailed` or `LayoutsMissing`."""


class FormRails(Instruction, frozen=True):
    """Have the communicators reach `nodes`. Ends in `RailsFormed` of the same number."""

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
    """Have an engine on another node than the trainer's show its places. Ends in `PlacesShown`."""

    engine: str


class LoadBucket(Instruction, frozen=True):
    """Hand each tensor-parallel rank of the engine its tickets for `count` buckets, beginning with `bucket`.

    Ends in one `BucketLoaded` for all of them.
    """

    engine: str
    bucket: int
    count: Annotated[int, msgspec.Meta(ge=1, le=MOST_LOADED)] = 1


class AwaitRelease(Instruction, frozen=True):
    """Wait for the fence of this engine's readers. Ends in `BucketReleased`, with `leaked` if the deadline passes."""

    engine: str
    bucket: int


class FinishEngine(Instruction, frozen=True):
    """Have the engine post-process, flush and set the version: everything is loaded."""

    engine: str


class VerifyEngine(Instruction, frozen=True):
    """Compare what lies in the engine's memory with what the trainer sent."""

    engine: str


class ResumeEngine(Instruction, frozen=True):
    """Have the engine serve again."""

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
    """Have the bridges exchange the parts of a bucket, which ranks have written into their own nodes' slots of `slots`.

    Then each of these slots has the whole bucket. Ends in `BucketRelayed`, which names home, too.
    """

    bucket: int
    slots: tuple[Slot, ...]


class DeliverWeights(Instruction, frozen=True):
    """Have the bridges bring weights straight from the memory that ranks expose into the places of these engines.

    Ends in `WeightsDelivered`.
    """

    engines: tuple[str, ...]
    nodes: tuple[str, ...]  # of each engine


class RevokeBucket(Instruction, frozen=True):
    """Revoke the hold on the bucket of an engine's readers, because the engine was evicted. Ends in no event."""

    engine: str
    bucket: int


class RetireBridge(Instruction, frozen=True):
    """Replace a bridge and its arena, because an unreachable process may still write there. Ends in no event."""

    node: str
    bridge: int
    reason: str
