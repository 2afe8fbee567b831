"""What the daemon tells a bridge and what it answers, and their bytes on the pipe between the two.

A frame is a little-endian u32 length and a MessagePack map, either a `Request` or a `Response`. Both ends are processes
of one user that started from one installation, so nothing is negotiated; bytes are bounded and validated all the same,
because a half-written frame of a killed process must be an error and not a strange command.

Each command class names its reply: `Command[Exported]` is answered by `Exported`, or by an `ErrorRecord`.
"""

from __future__ import annotations

import struct
from typing import Annotated, ClassVar, Generic, Literal, TypeVar

import msgpack
import msgspec
from msgspec import Meta

from weightsync.errors import CodecError, ErrorRecord
from weightsync.ipc.descriptors import Algorithm
from weightsync.ipc.ledger import Account
from weightsync.plan.shares import MemberPart

__all__ = [
    "MAX_FRAME",
    "AwaitReleased",
    "Command",
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
    "Ready",
    "Receive",
    "Received",
    "Reply",
    "Request",
    "Response",
    "Revoke",
    "Send",
    "SendGroup",
    "Stop",
    "Warm",
    "decode_request",
    "decode_response",
    "encode",
    "frame_length",
]

MAX_FRAME = 4 * 2**20  # bytes; the largest frame is an `Exported` of 512 tickets, about 100 KiB
HEADER = struct.Struct("<I")

Natural = Annotated[int, Meta(ge=0, lt=2**60)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Text = Annotated[str, Meta(max_length=1024)]
Blob = Annotated[bytes, Meta(max_length=64 * 1024)]
Names = Annotated[tuple[Name, ...], Meta(max_length=4096)]
Tickets = Annotated[dict[Name, Blob], Meta(max_length=4096)]


class Reply(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Any successful answer."""


class Done(Reply, frozen=True, kw_only=True, tag="done"):
    """It is done and there is nothing to tell."""


class Ready(Reply, frozen=True, kw_only=True, tag="ready"):
    """The bridge is up; `offer` lets a trainer rank attach its arena (`Arena.attach(offer, writable=True)`)."""

    pid: Natural
    incarnation: Name
    offer: Blob
    slots: Natural
    slot_bytes: Natural


class Offered(Reply, frozen=True, kw_only=True, tag="offered"):
    """What one local reader needs to attach: `BucketReceiver.accept(offer)`."""

    offer: Blob


class Exported(Reply, frozen=True, kw_only=True, tag="exported"):
    """Tickets by reader, and by peer; `checksum` is that of the bucket, by `algorithm`."""

    tickets: Tickets
    peer_tickets: Tickets
    algorithm: Algorithm
    checksum: Annotated[int, Meta(ge=0)]


class PendingReaders(Reply, frozen=True, kw_only=True, tag="pending_readers"):
    """Readers and peers that may still read from the slot, and readers that released it having read something else."""

    readers: Names
    damaged: Names = ()


class LedgerBooks(Reply, frozen=True, kw_only=True, tag="ledger_books"):
    """One account for every reader and peer that was ever exported to."""

    accounts: Annotated[tuple[Account, ...], Meta(max_length=8192)]


class Hosted(Reply, frozen=True, kw_only=True, tag="hosted"):
    """The rendezvous of the generation listens on `port`."""

    port: Annotated[int, Meta(ge=1, le=65535)]


class Received(Reply, frozen=True, kw_only=True, tag="received"):
    """A bucket lies in the slot, verified. `Export` of this slot and sequence does not compute its checksum again."""

    sequence: Natural
    nbytes: Natural
    seconds: float


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
    | Stop
)
AnyReply = Done | Ready | Offered | Exported | PendingReaders | LedgerBooks | Hosted | Received


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A command on the pipe. `timeout` is in seconds from when the bridge reads it; it answers by then."""

    id: Natural
    timeout: Annotated[float, Meta(ge=0, le=1e6)]
    command: AnyCommand


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to the request of the same `id`: a reply or an error, never both."""

    id: Natural
    reply: AnyReply | None = None
    error: ErrorRecord | None = None


def encode(message: Request | Response) -> bytes:
    """The frame of one message, header included. Raises `CodecError` if it would be larger than `MAX_FRAME`."""
    body = msgspec.msgpack.encode(message)
    if len(body) > MAX_FRAME:
        raise CodecError(f"a frame of {len(body)} bytes is larger than {MAX_FRAME}")
    return HEADER.pack(len(body)) + body


def frame_length(header: bytes) -> int:
    """Bytes that follow a header of `HEADER.size` bytes. Raises `CodecError` outside 1 … `MAX_FRAME`."""
    (length,) = HEADER.unpack(header)
    if not 1 <= length <= MAX_FRAME:
        raise CodecError(f"a frame header announces {length} bytes; 1 … {MAX_FRAME} are allowed")
    return int(length)


def decode_request(body: bytes) -> Request:
    """The request in a frame's body. Raises `CodecError` only."""
    return _decode(body, Request)


def decode_response(body: bytes) -> Response:
    """The response in a frame's body. Raises `CodecError` only."""
    response = _decode(body, Response)
    if (response.reply is None) == (response.error is None):
        raise CodecError("a response holds either a reply or an error")
    return response


M = TypeVar("M", Request, Response)


def _decode(body: bytes, kind: type[M]) -> M:
    try:
        plain = msgpack.unpackb(body, strict_map_key=True, max_array_len=8192, max_map_len=8192, max_ext_len=0)
        return msgspec.convert(plain, kind)
    except (ValueError, TypeError, RecursionError, msgspec.ValidationError) as error:
        raise CodecError(f"no {kind.__name__.lower()} of a bridge: {error}") from error
