"""What the daemon tells our plugin inside SGLang's scheduler: plain MessagePack, in a field that stock servers have.

An order travels as the `action` of `POST /weights_checker`: it reaches every tensor-parallel rank, it neither waits for
running requests nor blocks new ones, nothing in it is unpickled, and a server without the plugin answers
"Unsupported action" and is left as it was. The plugin's answer is the `message` of the reply.
"""

from __future__ import annotations

import binascii
from typing import TYPE_CHECKING, Annotated, TypeAlias

import msgspec
from msgspec import Meta

from weightsync.errors import CodecError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "PREFIX",
    "PROTOCOL",
    "Accept",
    "Accepted",
    "AnyOrder",
    "Begin",
    "Boxes",
    "Draw",
    "Finish",
    "Load",
    "Order",
    "Places",
    "State",
    "Step",
    "Sums",
    "decode",
    "encode",
    "pack_answers",
    "unpack_answers",
]

PROTOCOL = 4
PREFIX = f"weightsync{PROTOCOL}:"

Target = Annotated[str, Meta(pattern="^(all|target|draft)$")]
Seconds = Annotated[float, Meta(gt=0, le=86400)]


class Order(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Anything the daemon may ask for."""


class Accept(Order, frozen=True, tag="accept"):
    """Would the model take these tensors? Answered by `Accepted`, as JSON."""

    manifest: bytes  # packed
    target: Target


class Step(Order, frozen=True):
    """A part of an update. `update` tells it from those of any other, such as another daemon's."""

    update: Annotated[str, Meta(min_length=16, max_length=64)]


class Begin(Step, frozen=True, tag="begin", omit_defaults=True):
    """Open an update, dropping one that is open. `offers[tp_rank]` are that rank's attach descriptors. `pull`: what is
    loaded will be compared, so that buckets need not be. `anew`: what was learnt of the loader led to something wrong.
    """

    manifest: bytes  # packed, or the digest of one that the plugin has seen (`plan/told.py`)
    target: Target
    offers: tuple[tuple[bytes, ...], ...]
    seconds: Seconds
    pull: bool = False
    anew: bool = False


class Load(Step, frozen=True, tag="load"):
    """Load the buckets from `bucket` on, for each of which `tickets` has an entry; `[tp_rank]` of that is that rank's
    own ticket.
    """

    bucket: int
    tickets: tuple[tuple[bytes, ...], ...]
    seconds: Seconds


class Draw(Step, frozen=True, tag="draw"):
    """Instead of all buckets: read what is needed out of the trainer's memory. Answered by every rank, see
    `pack_answers`: by nothing, or by why it cannot.
    """

    exposures: bytes  # packed, or the digest of some that the plugin has seen
    seconds: Seconds


class Places(Step, frozen=True, tag="places"):
    """Instead of all buckets: where may others write what is needed? Answered by every rank's `Shown`, see
    `adapters/places.py`.
    """

    known: tuple[bytes, ...]  # digests of places that were told before


class Finish(Step, frozen=True, tag="finish"):
    """The last bucket was loaded: end the update."""


class Sums(Order, frozen=True, tag="sums"):
    """What lies in the model of the push that has ended? Answered by every rank's `HeldSums`, see `pack_answers`."""

    manifest: bytes  # its digest
    target: Target


class Boxes(Order, frozen=True, tag="boxes"):
    """Of which boxes do those sums speak? Answered by every rank's packed `ResidentBoxes`."""

    manifest: bytes  # its digest
    target: Target


class State(Order, frozen=True, tag="state"):
    """Who is it, and what does the server itself not say? Answered by the `PluginState` of rank 0, as JSON."""


class Accepted(msgspec.Struct, frozen=True):
    """What a model says of the names of a manifest; or, in SGLang's words, why it takes no weights at all."""

    unknown: tuple[str, ...] = ()
    untouched: tuple[str, ...] | None = ()  # None: it cannot tell
    refused: str = ""


AnyOrder: TypeAlias = Accept | Begin | Draw | Places | Load | Finish | Sums | Boxes | State


def encode(order: Order) -> str:
    """The action that stands for `order`."""
    return PREFIX + binascii.b2a_base64(msgspec.msgpack.encode(order), newline=False).decode()


def pack_answers(answers: Sequence[bytes]) -> str:
    """What all ranks answered, as one text."""
    return binascii.b2a_base64(msgspec.msgpack.encode(answers), newline=False).decode()


def unpack_answers(text: str) -> list[bytes]:
    """What `pack_answers` made. Raises `CodecError`."""
    try:
        return msgspec.msgpack.decode(binascii.a2b_base64(text.encode("ascii"), strict_mode=True), type=list[bytes])
    except (ValueError, msgspec.DecodeError, RecursionError) as error:
        raise CodecError(f"answers that cannot be read: {error}") from error


def decode(action: str) -> AnyOrder | None:
    """The order in an action; None for an action that is none of ours. Raises `CodecError` for a damaged one."""
    if not action.startswith("weightsync"):
        return None
    if not action.startswith(PREFIX):
        raise CodecError(
            f"the daemon speaks another protocol than this plugin, which speaks {PREFIX[:-1]}",
            hint="install the same weightsync in the engine's environment as on the node",
        )
    try:
        packed = binascii.a2b_base64(action[len(PREFIX) :].encode("ascii"), strict_mode=True)
        order: AnyOrder = msgspec.msgpack.decode(packed, type=AnyOrder)
    except (ValueError, msgspec.DecodeError, RecursionError) as error:
        raise CodecError(f"an order that cannot be read: {error}") from error
    return order
