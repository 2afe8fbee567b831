"""What the daemon tells a bridge: one class for each command.

Each names its reply: `Command[Exported]` is answered by `Exported` (`replies.py`), or by an `ErrorRecord`. How they
travel is in `frames.py`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Generic, Literal, TypeVar

import msgspec
from msgspec import Meta

from weightsync.nccl_bridge.replies import (
    AnyReply,
    Blob,
    Bulk,
    Done,
    Exported,
    Hosted,
    LedgerBooks,
    Name,
    Names,
    Natural,
    Offered,
    PendingReaders,
    Ready,
    Received,
    Reply,
)
from weightsync.plan.shares import MemberPart

__all__ = [
    "AnyCommand",
    "AnyReply",
    "AwaitReleased",
    "Collect",
    "Command",
    "Deliver",
    "Done",
    "Exchange",
    "Export",
    "Exported",
    "Hello",
    "Host",
    "Hosted",
    "Join",
    "JoinGroup",
    "Leave",
    "LeaveGroup",
    "Ledger",
    "LedgerBooks",
    "Offer",
    "OfferGroup",
    "Offered",
    "Pending",
    "PendingReaders",
    "Prepare",
    "Ready",
    "Receive",
    "Received",
    "Reply",
    "Revoke",
    "Send",
    "SendGroup",
    "Stop",
    "Warm",
]

R = TypeVar("R", bound=Reply)


class Command(msgspec.Struct, Generic[R], frozen=True, kw_only=True, tag_field="type"):
    """Any command; `R` is the type of its reply, and `reply` the same for use at run time."""

    reply: ClassVar[type[Reply]]


class Hello(Command[Ready], frozen=True, kw_only=True, tag="hello"):
    """The first command: are you up, and where is your arena?"""

    reply = Ready


class Offer(Command[Offered], frozen=True, kw_only=True, tag="offer"):
    """Make the attach descriptor of one local reader, "engine/tp_rank", who takes the tickets of `transport`."""

    reply = Offered
    reader: Name
    transport: Name = "mapped"


class OfferGroup(Command[Offered], frozen=True, kw_only=True, tag="offer_group"):
    """Make the descriptor by which the ranks of an engine without our plugin join a process group with this bridge, as
    its `readers`. One that stands is offered again, to the same `incarnation` of the engine.
    """

    reply = Offered
    engine: Name
    incarnation: Annotated[str, Meta(max_length=256)]
    readers: Names
    host: Name  # this node's address, where the group meets
    helper: Literal["torch", "vllm"] = "torch"  # by which the engine's ranks join, see `weightsync.transports.group`


class JoinGroup(Command[Done], frozen=True, kw_only=True, tag="join_group"):
    """Join what was offered to an engine, which is asked to at the same time; answers when that is done, or at once
    where it is done already or is done with the first broadcast.
    """

    reply = Done
    engine: Name


class LeaveGroup(Command[Done], frozen=True, kw_only=True, tag="leave_group"):
    """Leave the group with an engine: it is gone, or has failed and may be in the middle of something. Answers at
    once; whatever waits in the group ends.
    """

    reply = Done
    engine: Name


class Export(Command[Exported], frozen=True, kw_only=True, tag="export"):
    """Give the first `nbytes` of `slot` to local `readers` (each by the transport of its last `Offer`) and to `peers`,
    bridges of other nodes.

    Exporting the same slot and sequence again adds readers to it. Peers stay pending until `Send` has ended.
    """

    reply = Exported
    slot: Natural
    nbytes: Natural
    sequence: Natural
    readers: Names = ()
    peers: Names = ()
    checksum: Annotated[int, Meta(ge=0)] | None = None  # as the trainer's ranks made it; None: compute one


class Pending(Command[PendingReaders], frozen=True, kw_only=True, tag="pending"):
    """Who may still read from `slot`? Answered at once, whatever else the bridge is doing."""

    reply = PendingReaders
    slot: Natural


class AwaitReleased(Command[PendingReaders], frozen=True, kw_only=True, tag="await_released"):
    """Answer when none of `readers` may read from `slot` any more, and which of them had read something else;
    `TransportTimeout` naming those who may if it takes too long."""

    reply = PendingReaders
    slot: Natural
    readers: Names


class Revoke(Command[Done], frozen=True, kw_only=True, tag="revoke"):
    """Stop waiting for `reader`, which is lost: in one slot, or in all. Answered at once."""

    reply = Done
    reader: Name
    slot: Natural | None = None


class Ledger(Command[LedgerBooks], frozen=True, kw_only=True, tag="ledger"):
    """Exports, opens, closes and revocations so far. Answered at once."""

    reply = LedgerBooks


class Warm(Command[Done], frozen=True, kw_only=True, tag="warm"):
    """Load what a communicator needs. It takes seconds, the first time, which no `Join` should have to spend."""

    reply = Done


class Host(Command[Hosted], frozen=True, kw_only=True, tag="host"):
    """Open the rendezvous of `generation` on `host` (an address of this node), at any free port."""

    reply = Hosted
    generation: Natural
    host: Name


class Join(Command[Done], frozen=True, kw_only=True, tag="join"):
    """Become `rank` of `world` in the communicator of `generation`, leaving the old one; answers when all joined."""

    reply = Done
    generation: Natural
    rank: Natural
    world: Annotated[int, Meta(ge=1, le=4096)]
    host: Name  # where the rendezvous listens, and …
    port: Annotated[int, Meta(ge=1, le=65535)]  # … its port, from `Hosted`
    address: Name  # this node's own address, to which the communicator's sockets are bound
    key: Name  # secret shared by the members: keys of the rendezvous cannot be guessed without it


class Leave(Command[Done], frozen=True, kw_only=True, tag="leave"):
    """Abort the communicator: a `Join`, `Send` or `Receive` under way fails with `TransportClosed`. No peer stays
    pending. Leaving without having joined succeeds."""

    reply = Done


class Send(Command[Done], frozen=True, kw_only=True, tag="send"):
    """Broadcast the exported bytes of `slot` to every other member of the communicator."""

    reply = Done
    slot: Natural
    sequence: Natural


class Receive(Command[Received], frozen=True, kw_only=True, tag="receive"):
    """Take part in the broadcast that `ticket` announces, into `slot` of this bridge, and verify what came.

    `sequence` is the one under which the slot will be exported here; without it, the ticket's.
    """

    reply = Received
    ticket: Blob
    slot: Natural
    sequence: Natural | None = None


class SendGroup(Command[Done], frozen=True, kw_only=True, tag="send_group"):
    """Send the exported bytes of `slot` at `pieces` (little-endian i64 pairs: first byte, length) to the ranks of an
    engine, through the `group` that its ticket names; answers when they have left.
    """

    reply = Done
    engine: Name
    group: Name
    slot: Natural
    pieces: Annotated[bytes, Meta(max_length=2**21)]


class Exchange(Command[Done], frozen=True, kw_only=True, tag="exchange"):
    """Give every other member the parts of the bucket in `slot` that are this member's, and take theirs, verified.

    All members are told the same `parts`, and the same `token`, which no other exchange has. Their roots are ranks of
    `generation`.
    """

    reply = Done
    slot: Natural
    generation: Natural
    token: Natural
    parts: Annotated[tuple[MemberPart, ...], Meta(max_length=4096)]


class Prepare(Command[Done], frozen=True, kw_only=True, tag="prepare"):
    """Get ready for one end of a delivery, see `weightsync.nccl_bridge.carrier`: the first time for a layout it takes
    seconds. All ends are told the same, but for `places` and `exposures`.
    """

    reply = Done
    token: Natural  # that no other delivery has
    parcel: Annotated[int, Meta(ge=64, lt=2**40)]  # bytes at most
    turn: Natural  # of the …
    turns: Annotated[int, Meta(ge=1, le=4096)]  # deliveries that are under way side by side
    manifest: Bulk
    whole: bool  # parcels are of a share of the whole model, and not of what one engine has places for
    places: Bulk | None = None  # of the engine's ranks to which this goes; at the sending end, unless it is whole
    exposures: Bulk | None = None  # at the sending end: what the trainer's ranks expose


class Deliver(Command[Done], frozen=True, kw_only=True, tag="deliver"):
    """Send what was prepared under the token to the other members of the communicator; answers when it has left. Slots
    are used for it. Whatever the answer, nothing is read any more when it comes.
    """

    reply = Done
    generation: Natural
    token: Natural


class Collect(Command[Done], frozen=True, kw_only=True, tag="collect"):
    """Take that into the places it was prepared for; answers when it is there. Whatever the answer, nothing is written
    any more when it comes.
    """

    reply = Done
    generation: Natural
    token: Natural


class Stop(Command[Done], frozen=True, kw_only=True, tag="stop"):
    """Answer, remove the arena and exit with status 0."""

    reply = Done


AnyCommand = (
    Hello
    | Offer
    | OfferGroup
    | JoinGroup
    | LeaveGroup
    | Export
    | Pending
    | AwaitReleased
    | Revoke
    | Ledger
    | Warm
    | Host
    | Join
    | Leave
    | Send
    | Receive
    | SendGroup
    | Exchange
    | Prepare
    | Deliver
    | Collect
    | Stop
)
