"""Every message between a trainer rank, an operator's command and a daemon, and between two daemons.

Each is a frozen struct; on the wire it is one MessagePack map `{v, type, id, …}`. `id` pairs an answer with its
question, and is 0 if there is no question. Fields are only ever added, with a default; a changed meaning takes a new
type.

    rank → daemon      Open, Describe, Filled, Exposed, Measured, Failed, Stopped, Heartbeat, PushLora
    daemon → rank      Welcome, AskDescription, Planned, Lease, AskExposure, Drawn, Ended, Heartbeat, LoraPushed
    operator → daemon  StatusRequest, TraceRequest, ChangeEngines
    daemon → operator  Status, Traced, Changed
    daemon → daemon    Attach, Execute, JoinRail, Receive, Exchange, Prepare, Collect, Gather, TellRank,
                       Release, Register, Heartbeat, PushLora
                       Attached, Executed, RankSays, Registered, LoraPushed, Free
    anyone             ErrorReply

Import them from here. They are defined in `trainer_messages`, `operator_messages` and `daemon_messages`.
"""

from __future__ import annotations

from weightsync.errors import ErrorRecord
from weightsync.wire.daemon_messages import (
    Attach,
    Attached,
    Claim,
    Collect,
    Exchange,
    Execute,
    Executed,
    Free,
    Gather,
    Holder,
    JoinRail,
    Prepare,
    RankSays,
    Receive,
    Register,
    Registered,
    Release,
    TellRank,
)
from weightsync.wire.fields import Message
from weightsync.wire.operator_messages import (
    BridgeStatus,
    Changed,
    ChangeEngines,
    EngineProgress,
    EngineStatus,
    FollowedPush,
    KeeperStatus,
    PeerStatus,
    PushStatus,
    Status,
    StatusRequest,
    Traced,
    TraceRequest,
)
from weightsync.wire.trainer_messages import (
    AskDescription,
    AskExposure,
    Describe,
    Drawn,
    Ended,
    EngineOutcome,
    Exposed,
    Failed,
    Filled,
    Heartbeat,
    Lease,
    LoraOutcome,
    LoraPushed,
    Measured,
    Open,
    Planned,
    PushLora,
    PushOutcome,
    RankWords,
    Stopped,
    Welcome,
)

__all__ = [
    "LARGE",
    "MESSAGES",
    "AskDescription",
    "AskExposure",
    "Attach",
    "Attached",
    "BridgeStatus",
    "ChangeEngines",
    "Changed",
    "Claim",
    "Collect",
    "Describe",
    "Drawn",
    "Ended",
    "EngineOutcome",
    "EngineProgress",
    "EngineStatus",
    "ErrorReply",
    "Exchange",
    "Execute",
    "Executed",
    "Exposed",
    "Failed",
    "Filled",
    "FollowedPush",
    "Free",
    "Gather",
    "Heartbeat",
    "Holder",
    "JoinRail",
    "KeeperStatus",
    "Lease",
    "LoraOutcome",
    "LoraPushed",
    "Measured",
    "Message",
    "Open",
    "PeerStatus",
    "Planned",
    "Prepare",
    "PushLora",
    "PushOutcome",
    "PushStatus",
    "RankSays",
    "RankWords",
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


class ErrorReply(Message, frozen=True, tag="error"):
    """The error that answers the question of the same id, or a frame that could not be read."""

    error: ErrorRecord


MESSAGES: tuple[type[Message], ...] = (
    Open,
    Welcome,
    AskDescription,
    Describe,
    Planned,
    Lease,
    Filled,
    Exposed,
    AskExposure,
    Measured,
    Drawn,
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
    Prepare,
    Collect,
    Free,
)
LARGE: frozenset[type[Message]] = frozenset(
    {
        Describe,
        Planned,
        Exposed,
        Measured,
        Execute,
        Filled,
        Status,
        Ended,
        Attach,
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
