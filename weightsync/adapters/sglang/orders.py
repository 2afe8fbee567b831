"""The daemon's orders to our plugin inside SGLang's scheduler: plain MessagePack, in a field that stock servers have.

An order travels as the `action` of `POST /weights_checker`. It reaches every tensor-parallel rank, neither waits for
running requests nor blocks new ones, and is not unpickled. A server without the plugin answers "Unsupported action" and
is left as it was. The plugin's answer is the `message` of the reply.
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
    """Anything that the daemon may order."""


class Accept(Order, frozen=True, tag="accept"):
    """Ask whether the model would take these tensors. Answered by `Accepted`, as JSON."""

    manifest: bytes  # packed
    target: Target


class Step(Order, frozen=True):
    """A step of an update. `update` names that update, so that steps of another one, such as another daemon's, fail."""

    update: Annotated[str, Meta(min_length=16, max_length=64)]


class Begin(Step, frozen=True, tag="begin", omit_defaults=True):
    """Open an update, dropping one that is open. `offers[tp_rank]` are that rank's arena offers.

    `pull`: the loaded weights will be compared, so buckets need no check. `anew`: the last comparison failed, so the
    load plans are forgotten.
    """

    manifest: bytes  # packed, or the digest of one that the plugin has seen (`plan/told.py`)
    target: Target
    offers: tuple[tuple[bytes, ...], ...]
    seconds: Seconds
    pull: bool = False
    anew: bool = False


class Load(Step, frozen=True, tag="load"):
    """Load consecutive buckets from `bucket` on. `tickets[i][tp_rank]` is that rank's ticket for `bucket + i`."""

    bucket: int
    tickets: tuple[tuple[bytes, ...], ...]
    seconds: Seconds


class Draw(Step, frozen=True, tag="draw"):
    """Read the needed weights out of the trainer's memory, instead of all buckets.

    Every rank answers (`pack_answers`): with nothing, or with why it cannot.
    """

    exposures: bytes  # packed, or the digest of some that the plugin has seen
    seconds: Seconds


class Places(Step, frozen=True, tag="places"):
    """Show where bridges may write the needed weights, instead of all buckets.

    Answered by every rank's `Shown` (`adapters/places.py`).
    """

    known: tuple[bytes, ...]  # digests of places that the daemon knows


class Finish(Step, frozen=True, tag="finish"):
    """End the update: everything is loaded."""


class Sums(Order, frozen=True, tag="sums"):
    """Fingerprint what the model holds of the push that has ended. Answered by every rank's `HeldSums`."""

    manifest: bytes  # its digest
    target: Target


class Boxes(Order, frozen=True, tag="boxes"):
    """Tell which boxes the answers to `Sums` are about. Answered by every rank's packed `ResidentBoxes`."""

    manifest: bytes  # its digest
    target: Target


class State(Order, frozen=True, tag="state"):
    """Tell the incarnation, and the state that the server itself does not say.

    Answered by the `PluginState` of rank 0, as JSON.
    """


class Accepted(msgspec.Struct, frozen=True):
    """The answer to `Accept`."""

    unknown: tuple[str, ...] = ()  # pushed names that the model has no place for
    untouched: tuple[str, ...] | None = ()  # the model's names that the push leaves alone; None: it cannot tell
    refused: str = ""  # why the model takes no weights at all, in SGLang's words


AnyOrder: TypeAlias = Accept | Begin | Draw | Places | Load | Finish | Sums | Boxes | State


def encode(order: Order) -> str:
    """Encode `order` as an action."""
    return PREFIX + binascii.b2a_base64(msgspec.msgpack.encode(order), newline=False).decode()


def pack_answers(answers: Sequence[bytes]) -> str:
    """Encode the answers of all ranks as one text."""
    return binascii.b2a_base64(msgspec.msgpack.encode(answers), newline=False).decode()


def unpack_answers(text: str) -> list[bytes]:
    """Decode what `pack_answers` made. Raises `CodecError`."""
    try:
        return msgspec.msgpack.decode(binascii.a2b_base64(text.encode("ascii"), strict_mode=True), type=list[bytes])
    except (ValueError, msgspec.DecodeError, RecursionError) as error:
        raise CodecError(f"answers that cannot be read: {error}") from error


def decode(action: str) -> AnyOrder | None:
    """Decode the order in an action; None for an action that is not ours.

    Raises `CodecError` for a damaged order, or one of another protocol.
    """
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
