"""The daemon's commands to a bridge, one class for each.

Each class names its reply: the bridge answers a `Command[Exported]` with an `Exported` (`replies.py`), or with an
`ErrorRecord`. `frames.py` has the bytes of both.
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
    """Any command; `R` is the type of its reply, and `reply` the same type at run time."""

    reply: ClassVar[type[Reply]]


class Hello(Command[Ready], frozen=True, kw_only=True, tag="hello"):
    """The first command: are you up, and where is your arena?"""

    reply = Ready


class Offer(Command[Offered], frozen=True, kw_only=True, tag="offer"):
    """Make the attach descriptor of one local reader, "engine/tp_rank", which will get tickets of `transport`."""

    reply = Offered
    reader: Name
    transport: Name = "mapped"


class OfferGroup(Command[Offered], frozen=True, kw_only=True, tag="offer_group"):
    """Make the descriptor by which the ranks of an engine without our plugin join a process group with this bridge.

    The ranks are `readers` of the bridge. An existing group is offered again to the same `incarnation` of the engine.
    """

    reply = Offered
    engine: Name
    incarnation: Annotated[str, Meta(max_length=256)]
    readers: Names
    host: Name  # this node's address, where the group meets
    helper: Literal["torch", "vllm"] = "torch"  # code that the engine's ranks join with: `weightsync.transports.group`


class JoinGroup(Command[Done], frozen=True, kw_only=True, tag="join_group"):
    """Join the group that was offered to `engine`; the engine is told to join at the same time.

    Answered when all have joined; at once if they have already, or if they join with the first broadcast.
    """

    reply = Done
    engine: Name


class LeaveGroup(Command[Done], frozen=True, kw_only=True, tag="leave_group"):
    """Leave the group with an engine that is gone, or has failed and may be in the middle of an operation.

    Answered at once; operations that wait in the group end.
    """

    reply = Done
    engine: Name


class Export(Command[Exported], frozen=True, kw_only=True, tag="export"):
    """Give the first `nbytes` of `slot` to local `readers`, and to `peers`, which are bridges of other nodes.

    Each reader gets a ticket of the transport of its last `Offer`. Exporting the same slot and sequence again adds
    readers to it. Peers stay pending until `Send` has ended.
    """

    reply = Exported
    slot: Natural
    nbytes: Natural
    sequence: Natural
    readers: Names = ()
    peers: Names = ()
    checksum: Annotated[int, Meta(ge=0)] | None = None  # the trainer ranks' own; None: compute one


class Pending(Command[PendingReaders], frozen=True, kw_only=True, tag="pending"):
    """Ask which readers may still read from `slot`. Answered at once, whatever else the bridge is doing."""

    reply = PendingReaders
    slot: Natural


class AwaitReleased(Command[PendingReaders], frozen=True, kw_only=True, tag="await_released"):
    """Answer when none of `readers` may read from `slot` any more, with those whose read back differs.

    Fails with a `TransportTimeout` that names the readers still pending at the deadline.
    """

    reply = PendingReaders
    slot: Natural
    readers: Names


class Revoke(Command[Done], frozen=True, kw_only=True, tag="revoke"):
    """Stop waiting for `reader`, which is lost, in `slot` or in all slots. Answered at once."""

    reply = Done
    reader: Name
    slot: Natural | None = None


class Ledger(Command[LedgerBooks], frozen=True, kw_only=True, tag="ledger"):
    """Exports, opens, closes and revocations so far. Answered at once."""

    reply = LedgerBooks


class Warm(Command[Done], frozen=True, kw_only=True, tag="warm"):
    """Load the libraries of a communicator: the first time takes seconds, which a `Join` should not have to spend."""

    reply = Done


class Host(Command[Hosted], frozen=True, kw_only=True, tag="host"):
    """Open the rendezvous of `generation` on `host`, an address of this node, at any free port."""

    reply = Hosted
    generation: Natural
    host: Name


class Join(Command[Done], frozen=True, kw_only=True, tag="join"):
    """Become `rank` of `world` in the communicator of `generation`, leaving the old one; answers when all joined."""

    reply = Done
    generation: Natural
    rank: Natural
    world: Annotated[int, Meta(ge=1, le=4096)]
    host: Name  # address of the rendezvous
    port: Annotated[int, Meta(ge=1, le=65535)]  # of the rendezvous, from `Hosted`
    address: Name  # this node's own address, to which the communicator's sockets are bound
    key: Name  # secret of the members, so that nobody else can guess the rendezvous's keys


class Leave(Command[Done], frozen=True, kw_only=True, tag="leave"):
    """Abort the communicator: a `Join`, `Send` or `Receive` under way fails with `TransportClosed`.

    No peer stays pending. Leaving without having joined succeeds.
    """

    reply = Done


class Send(Command[Done], frozen=True, kw_only=True, tag="send"):
    """Broadcast the exported bytes of `slot` to every other member of the communicator."""

    reply = Done
    slot: Natural
    sequence: Natural


class Receive(Command[Received], frozen=True, kw_only=True, tag="receive"):
    """Receive the broadcast that `ticket` announces into `slot` of this bridge, and verify the bytes.

    The slot will be exported here under `sequence`; if that is None, under the ticket's.
    """

    reply = Received
    ticket: Blob
    slot: Natural
    sequence: Natural | None = None


class SendGroup(Command[Done], frozen=True, kw_only=True, tag="send_group"):
    """Send the exported bytes of `slot` at `pieces` to the ranks of an engine, through the `group` of its ticket.

    `pieces` are little-endian i64 pairs: first byte, length. Answered when the bytes have left.
    """

    reply = Done
    engine: Name
    group: Name
    slot: Natural
    pieces: Annotated[bytes, Meta(max_length=2**21)]


class Exchange(Command[Done], frozen=True, kw_only=True, tag="exchange"):
    """Give every other member this member's parts of the bucket in `slot`, and take and verify theirs.

    All members are told the same `parts`, whose roots are ranks of `generation`, and the same `token`, which no other
    exchange has.
    """

    reply = Done
    slot: Natural
    generation: Natural
    token: Natural
    parts: Annotated[tuple[MemberPart, ...], Meta(max_length=4096)]


class Prepare(Command[Done], frozen=True, kw_only=True, tag="prepare"):
    """Get ready for one end of a delivery (`weightsync.nccl_bridge.carrier`); takes seconds when a layout is new.

    All ends are told the same, except for `places` and `exposures`.
    """

    reply = Done
    token: Natural  # no other delivery has it
    parcel: Annotated[int, Meta(ge=64, lt=2**40)]  # bytes at most
    turn: Natural  # number of this delivery, from 0, …
    turns: Annotated[int, Meta(ge=1, le=4096)]  # … among those that run side by side
    manifest: Bulk
    whole: bool  # parcels hold a share of the whole model; else only tensors that the ranks have places for
    places: Bulk | None = None  # of the engines' ranks that receive; the sending end has them unless `whole`
    exposures: Bulk | None = None  # what the trainer's ranks expose; only at the sending end


class Deliver(Command[Done], frozen=True, kw_only=True, tag="deliver"):
    """Send the delivery that was prepared under `token` to the other members of the communicator, through free slots.

    Answered when it has left. Whatever the answer, nothing is read any more after it.
    """

    reply = Done
    generation: Natural
    token: Natural


class Collect(Command[Done], frozen=True, kw_only=True, tag="collect"):
    """Receive the delivery that was prepared under `token` into the engines' places.

    Answered when all of it is there. Whatever the answer, nothing is written any more after it.
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
