"""Works out which rank of which trainer this process is, without a message to any other process."""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import sys
from dataclasses import dataclass
from typing import Any

from weightsync.errors import LocalProtocolError

__all__ = ["TrainerPlace", "trainer_place"]


@dataclass(frozen=True)
class TrainerPlace:
    """Which rank of which trainer this process is."""

    group: str  # equal on all ranks of one trainer, different for every other trainer
    rank: int
    world: int


def trainer_place(process_group: Any = None) -> TrainerPlace:
    """Return this process's place, read from `torch.distributed` if that is initialised. Sends no message.

    Ranks recognise each other by the ranks of their group, and by the first of these that they have:
    - `$WEIGHTSYNC_TRAINER`;
    - values from their launcher: torchelastic's run id and restart count, the master's address and port;
    - the address of `torch.distributed`'s store, if there was no launcher, as in Ray actors.

    Raises `LocalProtocolError` if they have none of these, or if this process is not in `process_group`.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        if process_group is not None:
            raise LocalProtocolError("process_group was given, but torch.distributed is not initialised")
        return TrainerPlace(f"{socket.gethostname()}-{os.getpid()}-{_PROCESS}", 0, 1)
    rank = dist.get_rank(process_group)
    if rank < 0:
        raise LocalProtocolError("this process is not in the process_group it pushes with")
    ranks = dist.get_process_group_ranks(process_group if process_group is not None else dist.group.WORLD)
    shared = [_PROCESS, str(os.getpid())] if len(ranks) == 1 else _shared(dist)
    whole = hashlib.blake2b("|".join([*shared, *map(str, ranks)]).encode(), digest_size=8).hexdigest()
    return TrainerPlace(f"trainer-{whole}", rank, len(ranks))


def _shared(dist: Any) -> list[str]:
    """Return strings that are equal on all ranks of this trainer, and differ for every other trainer."""
    named = os.environ.get("WEIGHTSYNC_TRAINER")
    if named:
        return [named]
    if any(os.environ.get(name) for name in ("TORCHELASTIC_RUN_ID", "MASTER_PORT")):
        return [*_place(os.environ.get("MASTER_ADDR", "")), *(os.environ.get(name, "") for name in _LAUNCH)]
    store: Any = dist.distributed_c10d._get_default_store()  # torch has no public way to it
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        return [*_place(store.host), str(store.port)]
    if isinstance(store, dist.FileStore):
        return [store.path]
    raise LocalProtocolError(
        "ranks cannot recognise each other: their launcher gave them neither a run id nor a master's port, and "
        f"torch.distributed met at a {type(store).__name__}, which has no address",
        hint="set the same WEIGHTSYNC_TRAINER, unlike any other trainer's, on all ranks",
    )


def _place(address: str) -> list[str]:
    """Return a master's address, and this host's name if that address is a loopback, which every machine has.

    `torchrun` without a rendezvous gives 127.0.0.1:29500 and no run id.
    """
    loopback = address in ("localhost", "::1") or address.startswith("127.")
    return [address, socket.gethostname()] if loopback else [address]


_PROCESS = secrets.token_hex(4)
_LAUNCH = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")
