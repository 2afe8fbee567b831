"""A bridge's answers to the daemon, one class for each kind; see `commands`."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from weightsync.ipc.descriptors import Algorithm
from weightsync.ipc.ledger import Account

__all__ = [
    "NEVER",
    "AnyReply",
    "Blob",
    "Bulk",
    "Done",
    "Exported",
    "Hosted",
    "LedgerBooks",
    "Name",
    "Names",
    "Natural",
    "Offered",
    "PendingReaders",
    "Ready",
    "Received",
    "Reply",
    "Text",
    "Tickets",
]

NEVER = "never"  # phase of an error that every further attempt to prepare this delivery would end with

Natural = Annotated[int, Meta(ge=0, lt=2**60)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Text = Annotated[str, Meta(max_length=1024)]
Blob = Annotated[bytes, Meta(max_length=64 * 1024)]
Bulk = Annotated[bytes, Meta(min_length=16, max_length=2**28)]  # the bytes; 16: digest of bytes that were told before
Names = Annotated[tuple[Name, ...], Meta(max_length=4096)]
Tickets = Annotated[dict[Name, Blob], Meta(max_length=4096)]


class Reply(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Any successful answer."""


class Done(Reply, frozen=True, kw_only=True, tag="done"):
    """The command is done, and there is nothing to tell."""


class Ready(Reply, frozen=True, kw_only=True, tag="ready"):
    """The bridge is up. A trainer rank attaches its arena with `Arena.attach(offer, writable=True)`."""

    pid: Natural
    incarnation: Name
    offer: Blob
    slots: Natural
    slot_bytes: Natural


class Offered(Reply, frozen=True, kw_only=True, tag="offered"):
    """What a reader needs to attach: for `BucketReceiver.accept`, or how an engine joins its group."""

    offer: Blob


class Exported(Reply, frozen=True, kw_only=True, tag="exported"):
    """Tickets by reader and by peer, and the bucket's `checksum`, computed by `algorithm`."""

    tickets: Tickets
    peer_tickets: Tickets
    algorithm: Algorithm
    checksum: Annotated[int, Meta(ge=0)]


class PendingReaders(Reply, frozen=True, kw_only=True, tag="pending_readers"):
    """Readers and peers that may still read from the slot, and readers that released it but read back other bytes."""

    readers: Names
    damaged: Names = ()


class LedgerBooks(Reply, frozen=True, kw_only=True, tag="ledger_books"):
    """One account for every reader and peer that was ever exported to."""

    accounts: Annotated[tuple[Account, ...], Meta(max_length=8192)]


class Hosted(Reply, frozen=True, kw_only=True, tag="hosted"):
    """The rendezvous of the generation listens on `port`."""

    port: Annotated[int, Meta(ge=1, le=65535)]


class Received(Reply, frozen=True, kw_only=True, tag="received"):
    """A verified bucket lies in the slot. `Export` of this slot and sequence does not compute its checksum again."""

    sequence: Natural
    nbytes: Natural
    seconds: float


AnyReply = Done | Ready | Offered | Exported | PendingReaders | LedgerBooks | Hosted | Received
