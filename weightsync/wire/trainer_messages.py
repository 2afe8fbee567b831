"""Between a trainer rank and its daemon; see `messages`."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from weightsync.errors import ErrorRecord
from weightsync.wire.fields import Blob, Column, Digest, LoraName, Message, Name, Natural, Rank, Seconds, Text

__all__ = [
    "AskDescription",
    "AskExposure",
    "Describe",
    "Drawn",
    "Ended",
    "EngineOutcome",
    "Exposed",
    "Failed",
    "Filled",
    "Heartbeat",
    "Lease",
    "LoraOutcome",
    "LoraPushed",
    "Measured",
    "Open",
    "Planned",
    "PushLora",
    "PushOutcome",
    "RankWords",
    "Stopped",
    "Welcome",
]


class Open(Message, frozen=True, tag="open"):
    """A rank calls `push_weights`."""

    group: Name  # the same on all ranks of one trainer, another on every other
    rank: Rank
    world: Annotated[int, Meta(ge=1, le=2**20)]
    model: Name
    version: Natural
    pause: Annotated[str, Meta(pattern="^(keep|wait|abort|none)$")]
    timeout: Seconds  # for the whole push
    layout: Digest
    plan: Digest | None = None  # of the plan this rank has cached for the layout
    describe_seconds: Seconds = 0.0
    in_place: bool = False  # engines may read the weights where they lie
    engines: tuple[Name, ...] = ()  # those alone, which the version is new to: what was pushed before is pushed again
    pid: Annotated[int, Meta(ge=0, lt=2**31)] = 0  # of the rank
    started: Annotated[str, Meta(max_length=32)] = ""  # when that began, as `weightsync.processes` tells
    partial: bool = False  # the trainer has more tensors, which it was told to leave out


class Welcome(Message, frozen=True, tag="welcome"):
    """The daemon has heard; heartbeats go both ways from here to the end of the push."""

    node: Name
    heartbeat: Seconds  # how often it wants to hear from the rank


class AskDescription(Message, frozen=True, tag="ask_description"):
    """The daemon does not know the layout behind the digest."""


class Describe(Message, frozen=True, tag="describe"):
    """A packed `Layout`."""

    layout: Column


class Planned(Message, frozen=True, tag="planned"):
    """The plan. `manifest` and `fills` are left out when the rank said that it has them."""

    plan: Digest
    offers: Annotated[tuple[Blob, ...], Meta(max_length=64)]  # by bridge: the arenas to write into
    manifest: Column | None = None  # a packed `Manifest`
    fills: Column | None = None  # little-endian i32: the shards this rank writes
    expose: bool = False  # also say where they lie: `Exposed`, and then `Measured`


class Lease(Message, frozen=True, tag="lease"):
    """The rank may write its parts of the bucket into the slot."""

    bucket: Natural
    bridge: Natural
    slot: Natural


class Filled(Message, frozen=True, tag="filled"):
    """All parts of the bucket are written, with the fingerprint of each part's source, summed by tensor."""

    bucket: Natural
    nbytes: Natural
    tensors: Column  # little-endian u32: index in the manifest
    fingerprints: Column  # little-endian u64, as many


class Exposed(Message, frozen=True, tag="exposed"):
    """The rank's weights may be read where the exposure with this digest says; or why they cannot be."""

    digest: Digest | None = None
    exposure: Column | None = None  # a packed `Exposure`, left out when the daemon was told before
    problem: Text = ""


class AskExposure(Message, frozen=True, tag="ask_exposure"):
    """The daemon does not know the exposure behind the digest: the whole `Exposed`, please."""


class Measured(Message, frozen=True, tag="measured"):
    """The fingerprint of each part that the rank exposes, summed by tensor."""

    nbytes: Natural
    tensors: Column  # little-endian u32: index in the manifest
    fingerprints: Column  # little-endian u64, as many


class Drawn(Message, frozen=True, tag="drawn"):
    """Nobody reads what the rank exposes any more: it may change."""


class Failed(Message, frozen=True, tag="failed"):
    """The rank cannot go on and will write nothing more."""

    error: ErrorRecord


class Stopped(Message, frozen=True, tag="stopped"):
    """The rank has heard `Ended` and will write nothing more."""


RankWords: TypeAlias = Describe | Filled | Exposed | Measured | Failed | Stopped
"""What a rank says during a push."""


class Heartbeat(Message, frozen=True, tag="heartbeat"):
    """I am here."""

    coming: Text = ""  # the model that a rank is about to push to, once it has described what it holds


class EngineOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a push came to on one engine."""

    engine: Name
    node: Name
    outcome: Name  # committed | skipped | torn | lost
    version: int | None  # it serves after the push; None where it serves none
    seconds: float  # from pause to resume
    checked: Natural = 0  # tensors whose resident bytes were compared with the trainer's
    not_pushed: Natural | None = msgspec.field(default=0, name="untouched")  # its tensors that were not in the push
    drawn: bool = False  # its weights came from where the trainer has them, through no slots
    error: ErrorRecord | None = None


class PushOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a push came to; a `PushReport` is made from it."""

    model: Name
    version: Natural
    nbytes: Natural
    tensors: Natural
    buckets: Natural
    seconds: float
    phases: dict[str, float]
    engines: tuple[EngineOutcome, ...]


class Ended(Message, frozen=True, tag="ended"):
    """The push has ended: with an outcome, or with the error that every rank raises."""

    outcome: PushOutcome | None = None
    error: ErrorRecord | None = None


class PushLora(Message, frozen=True, tag="push_lora"):
    """A trainer calls `push_lora`; or its daemon passes that on. Answered by `LoraPushed`."""

    model: Name
    name: LoraName  # engines serve it as name@version
    version: Natural
    keep: Natural  # how many of the versions before stay loaded
    timeout: Seconds
    config: Column  # adapter_config.json, as peft writes it
    weights: Column  # adapter_model.safetensors, likewise
    forward: bool  # to the engines of other nodes, too


class LoraOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a push of a LoRA adapter came to on one engine."""

    engine: Name
    node: Name
    outcome: Name  # loaded | failed (as before) | lost
    error: ErrorRecord | None = None


class LoraPushed(Message, frozen=True, tag="lora_pushed"):
    """The push of a LoRA adapter has ended."""

    engines: tuple[LoraOutcome, ...]
