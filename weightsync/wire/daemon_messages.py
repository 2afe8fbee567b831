"""Messages between two daemons; see `messages`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from weightsync.errors import ErrorRecord
from weightsync.plan.shares import MemberPart
from weightsync.wire.fields import Blob, Column, Digest, Message, Name, Natural, Rank, Seconds, Text
from weightsync.wire.operator_messages import EngineStatus

__all__ = [
    "Attach",
    "Attached",
    "Claim",
    "Collect",
    "Exchange",
    "Execute",
    "Executed",
    "Free",
    "Gather",
    "Holder",
    "JoinRail",
    "Prepare",
    "RankSays",
    "Receive",
    "Register",
    "Registered",
    "Release",
    "TellRank",
]


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """A push that the sender is about to lead. A node that it concerns is held for it from now on, if it is free."""

    push: Name
    group: Name
    model: Name
    version: Natural
    engines: Annotated[tuple[Name, ...], Meta(max_length=4096)] = ()  # of a repeat, to these alone

    @property
    def repeat(self) -> bool:
        """Of what a keeper has kept, which no trainer has asked for."""
        return bool(self.engines)


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """The push that holds a node."""

    node: Name  # that leads it
    push: Name
    group: Text = ""  # "" where it is not known
    model: Name
    version: Natural
    pending: bool = False  # it is about to begin, or may not
    ending: bool = False  # it has ended, and lets go
    repeat: bool = False


class Attach(Message, frozen=True, tag="attach"):
    """The sender wants to coordinate pushes that reach this node's engines."""

    node: Name
    claim: Claim | None = None


class Attached(Message, frozen=True, tag="attached"):
    """The answer to `Attach`: this node's engines and bridges."""

    node: Name
    incarnation: Name
    engines: tuple[EngineStatus, ...]
    slots: tuple[Natural, ...]  # by bridge
    slot_bytes: Natural
    address: Name  # this node's own, for communicators
    peers: tuple[Name, ...] = ()  # nodes that this one itself coordinates pushes for
    device: Literal["cpu", "cuda"] = "cpu"  # where its slots lie
    gpus: tuple[Name, ...] = ()  # UUIDs, by bridge, if slots lie on GPUs
    holder: Holder | None = None  # that is in the way of what is claimed; where nothing is, whatever holds this node
    claimed: bool = False  # this node is held for what is claimed


class Free(Message, frozen=True, tag="free"):
    """To who claimed this node in vain: no push holds it any more."""


class Execute(Message, frozen=True, tag="execute"):
    """Carry out one instruction of a session on this node."""

    push: Name
    model: Name
    version: Natural
    instruction: dict[str, Any]  # a `weightsync.session.instructions.Instruction`, checked when it is decoded
    timeout: Seconds
    plan: Digest | None = None  # of the instruction's manifest
    manifest: Column | None = None  # the manifest itself, sent once to each follower
    fingerprints: Column | None = None  # for VerifyEngine: little-endian u64 for each tensor of the manifest
    places: Digest | None = None  # for ShowPlaces: of the places that the engine showed last


class Executed(Message, frozen=True, tag="executed"):
    """The outcome: a `weightsync.session.events.Event`."""

    event: dict[str, Any]
    places: Column | None = None  # packed `Exposures` that an engine has shown, if they differ from the last ones


class JoinRail(Message, frozen=True, tag="join_rail"):
    """Bridge `rail` joins the communicator of the generation."""

    rail: Natural
    generation: Natural
    rank: Rank
    world: Natural
    host: Name
    port: Natural
    key: Name
    timeout: Seconds
    push: bool = True  # for a push under way; False: formed beforehand, in case a push needs it


class Receive(Message, frozen=True, tag="receive"):
    """Take part in the broadcast of one bucket, into the slot. Answered by `Executed` once the bucket is verified."""

    push: Name
    bucket: Natural
    rail: Natural
    slot: Natural
    ticket: Blob
    timeout: Seconds


class Exchange(Message, frozen=True, tag="exchange"):
    """Take part in the exchange of one bucket; this node's part, if any, lies in the slot.

    Answered by `Executed` once all of the bucket is there, verified.
    """

    push: Name
    bucket: Natural
    rail: Natural
    slot: Natural
    generation: Natural  # of the communicator; the parts' roots are its ranks
    token: Natural  # no other exchange has it
    parts: Annotated[tuple[MemberPart, ...], Meta(max_length=4096)]
    timeout: Seconds
    checksum: Annotated[int, Meta(ge=0)] | None = None  # of the whole bucket, from the trainer's ranks


class Prepare(Message, frozen=True, tag="prepare"):
    """Get ready for a delivery to these engines, into the places that they have shown in this push.

    Answered by `Executed`.
    """

    push: Name
    rail: Natural
    engines: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=4096)]
    ranks: Annotated[tuple[Rank, ...], Meta(max_length=4096)]  # of the one engine; (): a share of the model, for all
    token: Natural  # no other delivery has it
    parcel: Natural = msgspec.field(name="piece")  # bytes at most
    turn: Natural  # number of this delivery, from 0, …
    turns: Natural  # … among those that run side by side
    timeout: Seconds


class Collect(Message, frozen=True, tag="collect"):
    """Receive the delivery that was prepared. Answered by `Executed` once all of it is there."""

    push: Name
    rail: Natural
    generation: Natural
    token: Natural
    timeout: Seconds


class Gather(Message, frozen=True, tag="gather"):
    """Let this trainer's ranks on your node take part in the push; answer with a `RankSays` whenever one speaks."""

    push: Name
    group: Name
    model: Name
    version: Natural


class RankSays(Message, frozen=True, tag="rank_says"):
    """A rank of the sender's node said something; or it is lost, and why; or it waits there for another push to end."""

    push: Name
    rank: Rank
    body: Column = b""  # the frame of an Open, Describe, Filled, Failed or Stopped
    lost: Text = ""
    waits_for: Text = ""  # a push that the sender leads


class TellRank(Message, frozen=True, tag="tell_rank"):
    """A message to a rank on the receiver's node."""

    push: Name
    rank: Rank
    body: Column  # the frame of an AskDescription, Planned, Lease or Ended


class Release(Message, frozen=True, tag="release"):
    """The push has ended: the node is free for other pushes, and engines that were only paused resume."""

    push: Name
    error: ErrorRecord | None = None  # for ranks that call later


class Register(Message, frozen=True, tag="register"):
    """Tell the seed that this node is up, and at which endpoint others reach it. Answered by `Registered`."""

    node: Name
    endpoint: Name
    leaving: bool = False


class Registered(Message, frozen=True, tag="registered"):
    """All nodes that have registered, by name."""

    nodes: Annotated[dict[Name, Name], Meta(max_length=8192)]
    complete: bool  # whether the seed has listened long enough to know every live node
