"""Messages between an operator's command and a daemon; see `messages`."""

from __future__ import annotations

from typing import Literal

import msgspec

from weightsync.engine_config import EngineConfig
from weightsync.errors import ErrorRecord
from weightsync.plan.replay_facts import ReplayFacts
from weightsync.wire.fields import Column, Message, Name, Natural, Seconds, Text
from weightsync.wire.trainer_messages import PushOutcome

__all__ = [
    "BridgeStatus",
    "ChangeEngines",
    "Changed",
    "EngineProgress",
    "EngineStatus",
    "FollowedPush",
    "KeeperStatus",
    "PeerStatus",
    "PushStatus",
    "Status",
    "StatusRequest",
    "TraceRequest",
    "Traced",
]


class StatusRequest(Message, frozen=True, tag="status_request"):
    """Ask for the daemon's state. Answered by `Status`."""

    fresh: bool = False  # first wait for a push that is over to release everything, and ask other nodes


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
    frozen: bool = False  # takes no pushes
    replay: ReplayFacts | None = None  # of its last push, if it runs our plugin and has loaded one


class BridgeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One bridge process."""

    node: Name
    index: Natural
    pid: int | None
    restarts: Natural
    slots: Natural
    slot_bytes: Natural
    outstanding: Natural  # exports that no reader has closed yet
    error: str | None = None  # why it is down (`pid` is None), or why it was restarted last
    gpu: str = ""  # UUID of the GPU that its slots lie on
    taken: Natural = 0  # slots that hold a bucket of the push under way
    exports: Natural = 0  # to readers, since it was started
    revoked: Natural = 0  # exports that were revoked, because their reader is no longer waited for
    holding: dict[Name, Natural] = {}  # reader → exports that it has not closed yet; readers with none are left out


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
    phases: dict[str, float] = {}  # seconds so far of phases that are over or have paused


class FollowedPush(msgspec.Struct, frozen=True, kw_only=True):
    """A push that another node coordinates and this one takes part in."""

    push: Name
    model: Text  # "" until the push has asked an engine for something
    version: Natural
    seconds: float


class KeeperStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One model's keeper."""

    model: Name
    pid: int | None  # None: it is not running
    version: Natural | None  # the one kept; None: none is
    nbytes: Natural


class PeerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Another node."""

    node: Name
    state: str  # connected | joining | why not
    endpoint: str
    engines: Natural
    bridges: Natural
    device: str  # where its slots lie; "" if it was not reached yet


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
    kept: dict[str, Natural] = msgspec.field(default_factory=dict)  # model → version that its keeper has
    pushed: dict[str, Natural] = msgspec.field(
        default_factory=dict
    )  # model → newest version that was committed here: only newer ones are taken
    keepers: tuple[KeeperStatus, ...] = ()
    nodes: tuple[PeerStatus, ...] = ()  # the nodes of `peers`, with more about each
    device: Literal["cpu", "cuda"] = "cpu"  # where slots lie
    shm_free: Natural | None = None  # bytes, in node.shm_dir
    leaks: Natural = 0  # exports that a reader never gave back, since the daemon was started
    last_ago: float | None = None  # seconds since the last push ended
    refused: ErrorRecord | None = None  # error of rank 0's last call that failed before it became a push
    refused_ago: float | None = None  # seconds
    follows: FollowedPush | None = None  # the push of another node that this one is part of
    waiting: Natural = 0  # calls of push_weights that wait for the node to be free
    seed: str = ""  # why cluster.seed cannot be reached; "" if it is reached, or there is none


class TraceRequest(Message, frozen=True, tag="trace_request"):
    """Ask for the trace of a push that began on this node. Answered by `Traced`."""

    model: Text = ""  # "": the push under way, or else the last one, of any model
    failed: bool = False  # the last push that failed


class Traced(Message, frozen=True, tag="traced"):
    """The trace of a push."""

    model: Name
    version: Natural
    document: Column  # JSON, see `weightsync.chrome_trace`


class ChangeEngines(Message, frozen=True, tag="change_engines"):
    """Add and remove engines now, or when the push under way has ended. Answered by `Changed`."""

    timeout: Seconds  # for that push to end; if it does not, nothing is changed
    add: tuple[EngineConfig, ...] = ()
    remove: tuple[Name, ...] = ()


class Changed(Message, frozen=True, tag="changed"):
    """The change was made."""

    engines: tuple[EngineStatus, ...]  # the added ones, as first seen
