"""Every message between a trainer rank, an operator's command and a daemon, and between two daemons.

Each is a frozen struct; on the wire it is one MessagePack map `{v, type, id, …}`. `id` pairs an answer with its
question and is 0 where there is none. Fields are only ever added, with a default; a changed meaning takes a new type.

    rank → daemon      Open, Describe, Filled, Failed, Stopped, Heartbeat, PushLora
    daemon → rank      Welcome, AskDescription, Planned, Lease, Ended, Heartbeat, LoraPushed
    operator → daemon  StatusRequest, TraceRequest, ChangeEngines
    daemon → operator  Status, Traced, Changed
    daemon → daemon    Attach, Execute, JoinRail, Receive, Exchange, Gather, TellRank, Release, Register, Heartbeat,
                       PushLora
                       Attached, Executed, RankSays, Registered, LoraPushed
    anyone             ErrorReply
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from weightsync.config import EngineConfig
from weightsync.errors import ErrorRecord
from weightsync.plan.shares import MemberPart
from weightsync.replay.facts import ReplayFacts

__all__ = [
    "MESSAGES",
    "AskDescription",
    "Attach",
    "Attached",
    "BridgeStatus",
    "ChangeEngines",
    "Changed",
    "Describe",
    "Ended",
    "EngineOutcome",
    "EngineProgress",
    "EngineStatus",
    "ErrorReply",
    "Exchange",
    "Execute",
    "Executed",
    "Failed",
    "Filled",
    "Gather",
    "Heartbeat",
    "JoinRail",
    "KeeperStatus",
    "Lease",
    "LoraOutcome",
    "LoraPushed",
    "Message",
    "Open",
    "PeerStatus",
    "Planned",
    "PushLora",
    "PushOutcome",
    "PushStatus",
    "RankSays",
    "Receive",
    "Register",
    "Registered",
    "Release",
    "Status",
    "StatusRequest",
    "Stopped",
    "TellRank",
    "TraceRequest",
    "Traced",
    "Welcome",
]

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Text = Annotated[str, Meta(max_length=16384)]
Natural = Annotated[int, Meta(ge=0, le=2**60)]
Rank = Annotated[int, Meta(ge=0, lt=2**20)]
Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]
Digest = Annotated[bytes, Meta(min_length=16, max_length=16)]
Blob = Annotated[bytes, Meta(max_length=64 * 1024)]  # an offer or a ticket
Column = Annotated[bytes, Meta(max_length=2**28)]  # packed numbers
LoraName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]  # part of a file's name


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Base of all messages. `large` types may use frames beyond `codec.SMALL_FRAME` bytes."""

    id: Natural = 0


# --- a trainer rank and its daemon ---------------------------------------------------------------------------------


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
    engines: tuple[Name, ...] = ()  # those alone, which the version is new to: what was pushed before is pushed again


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


class Failed(Message, frozen=True, tag="failed"):
    """The rank cannot go on and will write nothing more."""

    error: ErrorRecord


class Stopped(Message, frozen=True, tag="stopped"):
    """The rank has heard `Ended` and will write nothing more."""


class Heartbeat(Message, frozen=True, tag="heartbeat"):
    """I am here."""


class EngineOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a push came to on one engine."""

    engine: Name
    node: Name
    outcome: Name  # committed | skipped | torn | lost
    version: int | None  # it serves after the push; None where it serves none
    seconds: float  # from pause to resume
    checked: Natural = 0  # tensors whose resident bytes were compared with the trainer's
    untouched: Natural = 0  # tensors of the engine that the push did not hold
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


# --- an operator and a daemon --------------------------------------------------------------------------------------


class StatusRequest(Message, frozen=True, tag="status_request"):
    """How are you?"""

    fresh: bool = False  # look at engines of other nodes, and after a push that has just ended at all, before answering


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One engine as its daemon sees it."""

    name: Name
    node: Name
    kind: Name
    model: Name
    url: str
    state: Name  # serving | paused | torn | blank | lost | unknown
    version: int | None = None
    tp_size: int | None = None
    software: str | None = None
    profile: str | None = None
    error: str | None = None
    frozen: bool = False  # takes no pushes, whatever its model
    replay: ReplayFacts | None = None  # of its last push, where our plugin is in it and loaded one


class BridgeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One bridge process."""

    node: Name
    index: Natural
    pid: int | None
    restarts: Natural
    slots: Natural
    slot_bytes: Natural
    outstanding: Natural  # exports that no reader has closed yet
    error: str | None = None  # why it is not there (`pid` is None), or why it was restarted last
    gpu: str = ""  # UUID of the one that its slots lie on
    taken: Natural = 0  # slots that hold a bucket of the push under way
    exports: Natural = 0  # to readers, since it was started
    revoked: Natural = 0  # … of which were taken away, since nobody waits for their reader any more
    holding: dict[Name, Natural] = {}  # reader → exports that it has not closed yet; those with none are left out


class EngineProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far one engine is in the push under way."""

    engine: Name
    stage: Name  # probing | … | loading | … | committed | skipped | torn | lost
    loaded: Natural  # buckets


class PushStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The push under way."""

    model: Name
    version: Natural
    state: Name
    seconds: float
    nbytes: Natural
    filled_bytes: Natural
    waiting_for: str
    buckets: Natural = 0
    engines: tuple[EngineProgress, ...] = ()
    phases: dict[str, float] = {}  # seconds so far of those that are over or have paused


class FollowedPush(msgspec.Struct, frozen=True, kw_only=True):
    """A push that another node coordinates and this one takes part in."""

    push: Name
    model: Text  # "" until it has asked for something of an engine
    version: Natural
    seconds: float


class KeeperStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The process that keeps what was pushed last of one model."""

    model: Name
    pid: int | None  # None: it is not there
    version: Natural | None  # kept; None: nothing is
    nbytes: Natural


class PeerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Another node."""

    node: Name
    state: str  # connected | joining | why not
    endpoint: str
    engines: Natural
    bridges: Natural
    device: str  # where its slots lie; "" where it was not reached yet


class Status(Message, frozen=True, tag="status"):
    """Everything an operator asks for first."""

    node: Name
    software: str
    pid: int
    uptime: float
    engines: tuple[EngineStatus, ...]
    bridges: tuple[BridgeStatus, ...]
    peers: dict[str, str]  # node name → connected | lost | …
    push: PushStatus | None = None
    last: PushOutcome | None = None
    last_error: ErrorRecord | None = None
    kept: dict[str, Natural] = {}  # model → version that is kept to be pushed again
    pushed: dict[str, Natural] = {}  # model → newest version that was committed here: only newer ones are taken
    keepers: tuple[KeeperStatus, ...] = ()
    nodes: tuple[PeerStatus, ...] = ()  # the same as `peers`, with more about each
    device: Literal["cpu", "cuda"] = "cpu"  # where slots lie
    shm_free: Natural | None = None  # bytes, in node.shm_dir
    leaks: Natural = 0  # exports that a reader never gave back, since the daemon was started
    last_ago: float | None = None  # seconds since the last push ended
    refused: ErrorRecord | None = None  # of the last call, by a rank 0, that came to nothing before it was a push
    refused_ago: float | None = None  # seconds
    follows: FollowedPush | None = None  # what holds this node for another one


class TraceRequest(Message, frozen=True, tag="trace_request"):
    """What did a push that began on this node do when? Answered by `Traced`."""

    model: Text = ""  # "": of the push under way, or else the last, whichever model it was of
    failed: bool = False  # of the last that failed


class Traced(Message, frozen=True, tag="traced"):
    """The trace of a push."""

    model: Name
    version: Natural
    document: Column  # JSON, see `weightsync.chrome_trace`


# --- two daemons ---------------------------------------------------------------------------------------------------


class Attach(Message, frozen=True, tag="attach"):
    """The sender wants to coordinate pushes that reach this node's engines."""

    node: Name


class Attached(Message, frozen=True, tag="attached"):
    """What this node has to offer."""

    node: Name
    incarnation: Name
    engines: tuple[EngineStatus, ...]
    slots: tuple[Natural, ...]  # by bridge
    slot_bytes: Natural
    address: Name  # for communicators
    peers: tuple[Name, ...] = ()  # other nodes that it coordinates pushes for itself
    device: Literal["cpu", "cuda"] = "cpu"  # where its slots lie


class Execute(Message, frozen=True, tag="execute"):
    """Carry out one instruction of a session on this node."""

    push: Name
    model: Name
    version: Natural
    instruction: dict[str, Any]  # a `weightsync.session.instructions.Instruction`, checked when it is decoded
    timeout: Seconds
    plan: Digest | None = None  # digest of the manifest the instruction is about
    manifest: Column | None = None  # the manifest itself, once for each follower
    fingerprints: Column | None = None  # for VerifyEngine: little-endian u64 for each tensor of the manifest


class Executed(Message, frozen=True, tag="executed"):
    """The outcome: a `weightsync.session.events.Event`."""

    event: dict[str, Any]


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


class Receive(Message, frozen=True, tag="receive"):
    """Take part in the broadcast of one bucket, into the slot. Answered by `Executed` once the bucket is verified."""

    push: Name
    bucket: Natural
    rail: Natural
    slot: Natural
    ticket: Blob
    timeout: Seconds


class Exchange(Message, frozen=True, tag="exchange"):
    """Take part in the exchange of one bucket, of which a part may lie in the slot. Answered by `Executed` once all of
    it is there, verified.
    """

    push: Name
    bucket: Natural
    rail: Natural
    slot: Natural
    generation: Natural  # of the communicator that the parts' roots are ranks of
    token: Natural  # that no other exchange has
    parts: Annotated[tuple[MemberPart, ...], Meta(max_length=4096)]
    timeout: Seconds
    checksum: Annotated[int, Meta(ge=0)] | None = None  # of the whole bucket, as the trainer's ranks made it


class Gather(Message, frozen=True, tag="gather"):
    """Ranks of this trainer that call on your node take part in the push: `RankSays` is expected of each."""

    push: Name
    group: Name
    model: Name
    version: Natural


class RankSays(Message, frozen=True, tag="rank_says"):
    """What a rank there said; or that it is lost, and why."""

    push: Name
    rank: Rank
    body: Column = b""  # the frame of an Open, Describe, Filled, Failed or Stopped
    lost: Text = ""


class TellRank(Message, frozen=True, tag="tell_rank"):
    """Something for a rank there."""

    push: Name
    rank: Rank
    body: Column  # the frame of an AskDescription, Planned, Lease or Ended


class Release(Message, frozen=True, tag="release"):
    """The push has ended: the node is free for others, and engines that were only paused are let go."""

    push: Name
    error: ErrorRecord | None = None  # for ranks that call only now


class Register(Message, frozen=True, tag="register"):
    """To the seed: this node is there, and others reach it at the endpoint. Answered by `Registered`."""

    node: Name
    endpoint: Name
    leaving: bool = False


class Registered(Message, frozen=True, tag="registered"):
    """All nodes that have registered, by name."""

    nodes: Annotated[dict[Name, Name], Meta(max_length=8192)]
    complete: bool  # the seed has listened for long enough to know of every node that lives


class ChangeEngines(Message, frozen=True, tag="change_engines"):
    """Take some engines and leave others from now on, or once the push under way has ended. Answered by `Changed`."""

    timeout: Seconds  # for that push to end; after it, nothing is changed
    add: tuple[EngineConfig, ...] = ()
    remove: tuple[Name, ...] = ()


class Changed(Message, frozen=True, tag="changed"):
    """The change was made."""

    engines: tuple[EngineStatus, ...]  # the new ones, as they were found


class ErrorReply(Message, frozen=True, tag="error"):
    """The question of the same id, or a frame that could not be read, is answered with an error."""

    error: ErrorRecord


MESSAGES: tuple[type[Message], ...] = (
    Open,
    Welcome,
    AskDescription,
    Describe,
    Planned,
    Lease,
    Filled,
    Failed,
    Stopped,
    Heartbeat,
    Ended,
    StatusRequest,
    Status,
    Attach,
    Attached,
    Execute,
    Executed,
    JoinRail,
    Receive,
    Release,
    ErrorReply,
    ChangeEngines,
    Changed,
    Exchange,
    Gather,
    RankSays,
    TellRank,
    Register,
    Registered,
    PushLora,
    LoraPushed,
    TraceRequest,
    Traced,
)
LARGE: frozenset[type[Message]] = frozenset(
    {
        Describe,
        Planned,
        Execute,
        Filled,
        Status,
        Ended,
        Attached,
        Executed,
        Exchange,
        RankSays,
        TellRank,
        PushLora,
        LoraPushed,
        Traced,
    }
)
"""Types whose frames grow with the model; all others fit into `codec.SMALL_FRAME`."""
