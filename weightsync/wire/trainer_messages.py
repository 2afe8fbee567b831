"""Messages between a trainer rank and its daemon; see `messages`."""

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

    group: Name  # the same on all ranks of one trainer, different for every trainer
    rank: Rank
    world: Annotated[int, Meta(ge=1, le=2**20)]
    model: Name
    version: Natural
    pause: Annotated[str, Meta(pattern="^(keep|wait|abort|none)$")]
    timeout: Seconds  # for the whole push
    layout: Digest
    plan: Digest | None = None  # of the plan that this rank has cached for the layout
    describe_seconds: Seconds = 0.0
    in_place: bool = False  # engines may read the weights where they lie
    engines: tuple[Name, ...] = ()  # of a repeat: only these engines, which do not have the version yet
    pid: Annotated[int, Meta(ge=0, lt=2**31)] = 0  # of the rank
    started: Annotated[str, Meta(max_length=32)] = ""  # when that process began, in the form of `weightsync.processes`
    partial: bool = False  # the trainer has more tensors, which it was told to leave out


class Welcome(Message, frozen=True, tag="welcome"):
    """The daemon has the rank's `Open`. From here to the end of the push heartbeats go both ways."""

    node: Name
    heartbeat: Seconds  # interval at which it wants to hear from the rank


class AskDescription(Message, frozen=True, tag="ask_description"):
    """The daemon does not know the layout behind the digest."""


class Describe(Message, frozen=True, tag="describe"):
    """A packed `Layout`."""

    layout: Column


class Planned(Message, frozen=True, tag="planned"):
    """The plan. `manifest` and `fills` are left out if the rank said that it has them."""

    plan: Digest
    offers: Annotated[tuple[Blob, ...], Meta(max_length=64)]  # by bridge, of the arenas to write into
    manifest: Column | None = None  # a packed `Manifest`
    fills: Column | None = None  # little-endian i32: the shards this rank writes
    expose: bool = False  # also say where these shards lie: `Exposed`, and then `Measured`


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
    fingerprints: Column  # little-endian u64, one for each of `tensors`


class Exposed(Message, frozen=True, tag="exposed"):
    """The rank's weights may be read where this exposure says; or `problem` says why not."""

    digest: Digest | None = None
    exposure: Column | None = None  # a packed `Exposure`, left out when the daemon was told before
    problem: Text = ""


class AskExposure(Message, frozen=True, tag="ask_exposure"):
    """The daemon does not know the exposure behind the digest, and asks for the whole `Exposed`."""


class Measured(Message, frozen=True, tag="measured"):
    """The fingerprint of each part that the rank exposes, summed by tensor."""

    nbytes: Natural
    tensors: Column  # little-endian u32: index in the manifest
    fingerprints: Column  # little-endian u64, one for each of `tensors`


class Drawn(Message, frozen=True, tag="drawn"):
    """No engine or bridge reads the rank's exposed memory any more: it may change."""


class Failed(Message, frozen=True, tag="failed"):
    """The rank cannot go on and will write nothing more."""

    error: ErrorRecord


class Stopped(Message, frozen=True, tag="stopped"):
    """The rank has heard `Ended` and will write nothing more."""


RankWords: TypeAlias = Describe | Filled | Exposed | Measured | Failed | Stopped
"""What a rank says during a push."""


class Heartbeat(Message, frozen=True, tag="heartbeat"):
    """The sender is alive."""

    coming: Text = ""  # the model that a rank will push to, as soon as it has described its weights


class EngineOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a push came to on one engine."""

    engine: Name
    node: Name
    outcome: Name  # committed | skipped | torn | lost
    version: int | None  # the one that it serves after the push; None: it serves none
    seconds: float  # from pause to resume
    checked: Natural = 0  # tensors whose resident bytes were compared with the trainer's
    not_pushed: Natural | None = msgspec.field(default=0, name="untouched")  # its tensors that were not in the push
    drawn: bool = False  # it took its weights from the trainer's memory, not from slots
    error: ErrorRecord | None = None


class PushOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a push came to. A `PushReport` is made from it."""

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
    """A trainer calls `push_lora`, or its daemon passes the call on. Answered by `LoraPushed`."""

    model: Name
    name: LoraName  # engines serve it as name@version
    version: Natural
    keep: Natural  # how many earlier versions stay loaded
    timeout: Seconds
    config: Column  # adapter_config.json, as peft writes it
    weights: Column  # adapter_model.safetensors, as peft writes it
    forward: bool  # also to the engines of other nodes


class LoraOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a push of a LoRA adapter came to on one engine."""

    engine: Name
    node: Name
    outcome: Name  # loaded | failed (as before) | lost
    error: ErrorRecord | None = None


class LoraPushed(Message, frozen=True, tag="lora_pushed"):
    """The push of a LoRA adapter has ended."""

    engines: tuple[LoraOutcome, ...]
