"""How members of an NCCL communicator agree, through the store of their rendezvous, before any of them sets it up.

Rank 0 tells its settings. Each other rank compares them with its own, and agrees or fails. When all have agreed, rank 0
makes the unique id and tells it. A unique id leaves a thread and a listening socket behind until all members have come,
and cannot be given up. So none is made for members that do not fit.
"""

from __future__ import annotations

import fcntl
import os
import socket
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from weightsync.errors import CodecError, ConfigError, TransportBroken
from weightsync.nccl_bridge.library import UNIQUE_ID_BYTES, Nccl, settings_here

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Terms", "agree", "check_settings", "interface_of", "nccl", "prepare"]

_SIOCGIFADDR = 0x8915  # linux/sockios.h: an interface's IPv4 address, as the last 4 of the first 24 bytes
_UniqueId = Annotated[bytes, Meta(min_length=UNIQUE_ID_BYTES, max_length=UNIQUE_ID_BYTES)]


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """Rank 0's last message: the unique id, or why there is none."""

    unique_id: _UniqueId | None = None
    refusal: str = ""


@cache
def nccl() -> Nccl:
    """Return the library, loaded once. Raises `ConfigError`."""
    return Nccl()


@cache
def prepare(address: str) -> None:
    """Have NCCL use the network interface of `address`, this node's own, and check that it can; once in a process.

    A setting in the environment wins. Raises `ConfigError`, or `TransportBroken` with NCCL's text.
    """
    if name := interface_of(address):
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")
    nccl().unique_id()


def agree(store: Any, rank: int, world: int, pause: Callable[[], None]) -> bytes:
    """Return the unique id, the same on every member. `pause` waits a moment, and raises to give up.

    Raises `ConfigError` if NCCL is set up differently here than at rank 0, `TransportBroken` if rank 0 gives up.
    """
    mine = settings_here(nccl().version)
    if rank == 0:
        return _lead(store, world, mine, pause)
    check_settings(mine, _decoded(_told(store, "settings", pause), dict[str, str]))
    store.set(f"agreed/{rank}", b"1")
    terms: Terms = _decoded(_told(store, "terms", pause), Terms)
    if terms.unique_id is None:
        raise TransportBroken(f"rank 0 has given up: {terms.refusal}")
    return terms.unique_id


def _lead(store: Any, world: int, mine: dict[str, str], pause: Callable[[], None]) -> bytes:
    store.set("settings", msgspec.msgpack.encode(mine))
    try:
        while not store.check([f"agreed/{rank}" for rank in range(1, world)]):
            pause()
        terms = Terms(unique_id=nccl().unique_id())
    except Exception as error:
        store.set("terms", msgspec.msgpack.encode(Terms(refusal=str(error)[:200])))
        raise
    store.set("terms", msgspec.msgpack.encode(terms))
    assert terms.unique_id is not None
    return terms.unique_id


def _told(store: Any, key: str, pause: Callable[[], None]) -> bytes:
    while not store.check([key]):
        pause()
    return bytes(store.get(key))


def _decoded(data: bytes, kind: Any) -> Any:
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise CodecError(f"the rendezvous tells no terms of NCCL: {error}") from error


def check_settings(mine: dict[str, str], theirs: dict[str, str]) -> None:
    """Raise `ConfigError` if `mine` differ from `theirs`, rank 0's settings: NCCL would fail or hang."""
    different = [name for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name)]
    if different:
        told = ", ".join(f"{n} is {mine.get(n, 'unset')} here, {theirs.get(n, 'unset')} at rank 0" for n in different)
        raise ConfigError(
            f"NCCL is set up differently on two nodes: {told}",
            hint="make them alike in the environment of weightsyncd on every node",
        )


def interface_of(address: str) -> str | None:
    """Return the network interface with this IPv4 address; None if there is none to be found, and NCCL chooses."""
    try:
        wanted = socket.inet_aton(socket.gethostbyname(address))
    except OSError:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = name.encode()[:15].ljust(256, b"\0")
            try:
                found = fcntl.ioctl(probe, _SIOCGIFADDR, request)
            except OSError:  # an interface without an IPv4 address
                continue
            if found[20:24] == wanted:
                return name
    return None
