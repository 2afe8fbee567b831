"""One trainer rank in one push: say what it holds, fill the slots it is given leases for, hear the outcome.

The rank talks to its daemon and to the mapped arenas, and to no other rank. What it writes where is worked out once
for a plan (`fill program`) and kept, so that later pushes of the same layout only copy.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from weightsync.errors import (
    CodecError,
    DaemonLost,
    LocalProtocolError,
    PushAborted,
    PushTimeout,
    RemoteProtocolError,
    WeightSyncError,
)
from weightsync.filling.host import HostFill
from weightsync.filling.program import compile_program
from weightsync.filling.ready import weights_ready
from weightsync.ipc.arena import Arena, ArenaOffer
from weightsync.ipc.cuda import DeviceSlots
from weightsync.plan.manifest import Manifest
from weightsync.report import PushReport
from weightsync.wire import messages as msg
from weightsync.wire.control import TrainerLink

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightsync.errors import ErrorRecord
    from weightsync.filling.device import DeviceFill, DeviceProgram
    from weightsync.filling.program import Program
    from weightsync.sources.base import Source

__all__ = ["RankPush", "TrainerPlace", "trainer_place"]

logger = logging.getLogger(__name__)

_PROGRAMS = 8  # kept: models × layouts that alternate in one trainer
_GLANCE = 50e-6  # seconds between two looks at GPUs that fill


@dataclass(frozen=True)
class TrainerPlace:
    """Which rank of which trainer this process is."""

    group: str  # the same on all ranks of one trainer, another on every other
    rank: int
    world: int


def trainer_place(process_group: Any = None) -> TrainerPlace:
    """This process's place, from `torch.distributed` where that is in use; talks to nobody.

    Ranks recognise each other by what their launcher gave all of them: torchelastic's run id and how often it has
    started them again, the master's address and port, and the ranks of the group.
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
    shared = [os.environ.get(name, "") for name in _LAUNCH]
    if len(ranks) > 1 and not any(os.environ.get(name) for name in ("TORCHELASTIC_RUN_ID", "MASTER_PORT")):
        raise LocalProtocolError(
            "ranks cannot recognise each other: their launcher gave them neither a run id nor a master's port",
            hint="use torchrun, or set the same TORCHELASTIC_RUN_ID, unlike any other job's, on all ranks",
        )
    if len(ranks) == 1:
        shared.append(_PROCESS)
    whole = hashlib.blake2b("|".join([*shared, *map(str, ranks)]).encode(), digest_size=8).hexdigest()
    return TrainerPlace(f"trainer-{whole}", rank, len(ranks))


_PROCESS = secrets.token_hex(4)
_LAUNCH = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")


class _Memory:
    """What this process keeps between pushes: idle links, mapped arenas, fill programs."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.links: dict[str, list[TrainerLink]] = {}
        self.arenas: dict[bytes, Arena] = {}
        self.slots: dict[tuple[str, int], DeviceSlots] = {}  # of arenas on GPUs: (arena, GPU here) → mapped slots
        self.programs: OrderedDict[bytes, Program] = OrderedDict()  # by plan and layout digest
        self.device_programs: dict[bytes, DeviceProgram] = {}  # likewise
        self.plans: dict[tuple[str, bytes], bytes] = {}  # (endpoint, layout digest) → newest plan

    def take_link(self, endpoint: str) -> TrainerLink:
        with self.lock:
            idle = self.links.get(endpoint)
            if idle:
                return idle.pop()
        return TrainerLink(endpoint)

    def give_link(self, link: TrainerLink) -> None:
        link.rest()
        with self.lock:
            self.links.setdefault(link.endpoint, []).append(link)

    def map_arenas(self, offers: tuple[bytes, ...]) -> list[Arena]:
        """The arenas of these offers; those of bridges that have been replaced are unmapped."""
        with self.lock:
            known = {offer: self.arenas.get(offer) or Arena.attach(offer, writable=True) for offer in offers}
            nodes = {arena.name.rpartition("-")[0] for arena in known.values()}
            for offer, arena in list(self.arenas.items()):
                if offer not in known and arena.name.rpartition("-")[0] in nodes:
                    del self.arenas[offer]
                    for key in [key for key in self.slots if key[0] == arena.name]:
                        self.slots.pop(key).close()
                    arena.close()
            self.arenas.update(known)
            return [known[offer] for offer in offers]

    def map_slots(self, offer: bytes, device: int) -> DeviceSlots:
        """The slots of an arena on a GPU, for use on this process's GPU `device`."""
        wanted = ArenaOffer.unpack(offer)
        with self.lock:
            if (wanted.name, device) not in self.slots:
                self.slots[wanted.name, device] = DeviceSlots.open(wanted, device)
            return self.slots[wanted.name, device]

    def close_links(self) -> None:
        """Let every idle link say its last words; at exit."""
        with self.lock:
            for link in [link for idle in self.links.values() for link in idle]:
                link.close()
            self.links.clear()

    def keep_program(self, key: bytes, program: Program) -> None:
        with self.lock:
            self.programs[key] = program
            while len(self.programs) > _PROGRAMS:
                self.device_programs.pop(self.programs.popitem(last=False)[0], None)


_MEMORY = _Memory()
atexit.register(lambda: _MEMORY.close_links())


def _forget_after_fork() -> None:
    """Threads, sockets and the pool stayed with the parent."""
    global _MEMORY
    _MEMORY = _Memory()


os.register_at_fork(after_in_child=_forget_after_fork)


class _Told(Exception):
    """The daemon ended the push with `error`, on all ranks alike."""

    def __init__(self, error: WeightSyncError) -> None:
        super().__init__(str(error))
        self.error = error


class RankPush:
    """One call of `push_weights` on one rank."""

    def __init__(
        self,
        source: Source,
        *,
        place: TrainerPlace,
        version: int,
        model: str,
        endpoint: str,
        pause: str,
        started: float,
        deadline: float,
    ) -> None:
        """Describe the source. Raises `SourceError`."""
        self.on_progress: Callable[[int], None] | None = None  # called with bytes written so far, after each bucket
        self.version = version
        self.deadline = deadline
        self.filled = threading.Event()  # this rank's weights have been read
        self._source, self._place, self._model, self._endpoint = source, place, model, endpoint
        self._pause = pause
        self._layout = source.layout()
        self._describe_seconds = time.monotonic() - started
        self._number = secrets.randbits(48)  # tells messages about this push from late ones about another
        self._program: Program | None = None
        self._filling: HostFill | DeviceFill | None = None
        self._ready = weights_ready()
        self._buckets_left = 0
        self._written = 0
        self._busy_seconds = self._describe_seconds
        self._busy_since = 0.0

    def run(self) -> PushReport:
        """Take part in the push to its end."""
        link = _MEMORY.take_link(self._endpoint)
        try:
            link.start()
            self._open(link)
            try:
                outcome = self._converse(link)
            finally:
                if self._filling is not None:
                    self._filling.close()
        except DaemonLost:
            link.close(flush=0.0)
            raise
        except _Told as told:
            _MEMORY.give_link(link)
            raise told.error from None
        except BaseException as error:
            record = self._own_failure(error)
            link.send(msg.Failed(id=self._number, error=record))
            if not isinstance(error, Exception):  # Ctrl-C: whoever pressed it does not wait for words
                _MEMORY.give_link(link)
                raise
            try:
                heard = None if isinstance(error, PushTimeout) else self._hear_the_end(link)
            except DaemonLost as lost:  # with it went its arenas: that may be all that was wrong here
                link.close(flush=0.0)
                raise lost from error
            _MEMORY.give_link(link)
            if heard is None and isinstance(error, WeightSyncError):
                raise
            raise heard or record.error() from error
        _MEMORY.give_link(link)
        return PushReport.of(outcome, self._busy_seconds)

    def _open(self, link: TrainerLink) -> None:
        place, digest = self._place, self._layout.digest
        plan = _MEMORY.plans.get((self._endpoint, digest))
        if plan is not None and plan + digest not in _MEMORY.programs:
            plan = None
        link.send(
            msg.Open(
                id=self._number,
                group=place.group,
                rank=place.rank,
                world=place.world,
                model=self._model,
                version=self.version,
                pause=self._pause,
                timeout=max(0.001, self.deadline - time.monotonic()),
                layout=digest,
                plan=plan,
                describe_seconds=self._describe_seconds,
            )
        )

    def _converse(self, link: TrainerLink) -> msg.PushOutcome:
        # the daemon keeps the deadline and names what was missing; this side waits a little longer for its word
        until = self.deadline + link.patience
        while True:
            filling = self._filling
            if filling is not None and filling.busy:
                self._tell_filled(link, filling)
                message = link.receive(min(until, time.monotonic() + _GLANCE))
                if message is None and time.monotonic() < until:
                    continue
            else:
                message = link.receive(until)
            if message is not None and message.id != self._number and not isinstance(message, msg.ErrorReply):
                continue  # a late word about an earlier push
            match message:
                case None:
                    raise PushTimeout("the daemon did not end the push in time", version=self.version)
                case msg.Welcome():
                    link.set_heartbeat(message.heartbeat)
                case msg.AskDescription():
                    link.send(msg.Describe(id=self._number, layout=self._layout.pack()))
                case msg.Planned():
                    self._prepare(message)
                case msg.Lease():
                    self._fill(message)
                case msg.Ended():
                    link.send(msg.Stopped(id=self._number))
                    if message.outcome is not None:
                        return message.outcome
                    if message.error is not None:
                        raise _Told(message.error.error())
                    raise RemoteProtocolError("the push ended with neither an outcome nor an error")
                case msg.ErrorReply():
                    raise message.error.error()  # a frame of ours was refused
                case _:
                    raise RemoteProtocolError(f"a trainer rank does not take {type(message).__name__}")

    def _hear_the_end(self, link: TrainerLink) -> WeightSyncError | None:
        """After a failure of this rank: what every rank is told, which names the engines left torn. None if nothing is
        heard. Raises `DaemonLost`.
        """
        until = time.monotonic() + link.patience
        try:
            while (message := link.receive(until)) is not None:
                if isinstance(message, msg.Ended) and message.id == self._number:
                    return message.error.error() if message.error is not None else None
        except CodecError as error:
            logger.debug("the end of the push was not heard: %s", error)
        return None

    def _own_failure(self, error: BaseException) -> ErrorRecord:
        """What went wrong on this rank, as the other ranks hear it."""
        if isinstance(error, WeightSyncError):
            record = error.record()
            return record if record.rank is not None else msgspec.structs.replace(record, rank=self._place.rank)
        reason = "was interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {error!r}"
        return PushAborted(f"rank {self._place.rank} {reason}", rank=self._place.rank).record()

    # --- filling ---------------------------------------------------------------------------------------------------

    def _prepare(self, message: msg.Planned) -> None:
        digest = self._layout.digest
        key = message.plan + digest
        program = _MEMORY.programs.get(key)
        if program is None:
            if message.manifest is None or message.fills is None:
                raise RemoteProtocolError("the daemon left out a plan that this rank does not have")
            fills = np.frombuffer(message.fills, dtype="<i4")
            program = compile_program(message.plan, Manifest.unpack(message.manifest), self._layout, fills)
            _MEMORY.keep_program(key, program)
        _MEMORY.plans[self._endpoint, digest] = message.plan
        self._program = program
        self._buckets_left = program.buckets
        self._filling = self._filling_of(program, key, message.offers)
        if not self._buckets_left:
            self.filled.set()

    def _filling_of(self, program: Program, key: bytes, offers: tuple[bytes, ...]) -> HostFill | DeviceFill:
        arenas = _MEMORY.map_arenas(offers)
        if arenas[0].memory is None:
            return HostFill(self._source, program, arenas)
        from weightsync.filling import device as on_device

        gpu, held = on_device.rank_device(self._source), on_device.Held(self._source)
        known = _MEMORY.device_programs.get(key)
        if known is None or not known.fits(held, gpu):
            known = _MEMORY.device_programs[key] = on_device.DeviceProgram(program, held, gpu)
        known.update(held)
        slots = [_MEMORY.map_slots(offer, gpu.index) for offer in offers]
        return on_device.DeviceFill(self._source, known, slots, self._ready)

    def _fill(self, lease: msg.Lease) -> None:
        program, filling = self._program, self._filling
        if program is None or filling is None or lease.bucket >= len(program.writes):
            raise RemoteProtocolError(f"a lease for bucket {lease.bucket} that is not in the plan")
        if not filling.busy:
            self._busy_since = time.monotonic()
        filling.begin(lease.bucket, lease.bridge, lease.slot)

    def _tell_filled(self, link: TrainerLink, filling: HostFill | DeviceFill) -> None:
        for full in filling.finished():
            link.send(
                msg.Filled(
                    id=self._number,
                    bucket=full.bucket,
                    nbytes=full.nbytes,
                    tensors=np.fromiter(full.sums.keys(), dtype="<u4", count=len(full.sums)).tobytes(),
                    fingerprints=np.fromiter(full.sums.values(), dtype="<u8", count=len(full.sums)).tobytes(),
                )
            )
            self._written += full.nbytes
            self._buckets_left -= 1
            if not self._buckets_left:
                self.filled.set()
            if self.on_progress is not None:
                self.on_progress(self._written)
        if not filling.busy:
            self._busy_seconds += time.monotonic() - self._busy_since
