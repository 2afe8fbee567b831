"""What a trainer's process keeps between pushes: idle links, mapped arenas, and how to fill their slots."""

from __future__ import annotations

import atexit
import os
import threading
from collections import OrderedDict
from contextlib import contextmanager
from typing import TYPE_CHECKING

from weightsync.ipc.arena import Arena, ArenaOffer
from weightsync.ipc.cuda import DeviceSlots
from weightsync.ipc.gone import Lookout
from weightsync.plan.packing import DIGEST_BYTES
from weightsync.wire.trainer_link import TrainerLink

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightsync.exposing.device import DeviceExposed
    from weightsync.exposing.host import HostExposed
    from weightsync.filling.device import DeviceProgram
    from weightsync.filling.program import Program

__all__ = ["RankMemory", "memory"]

_PROGRAMS = 8  # kept: a trainer may alternate between models and layouts


class RankMemory:
    """The state of one process. Several pushes may use it at once."""

    def __init__(self) -> None:
        self.programs: OrderedDict[bytes, Program] = OrderedDict()  # by plan and layout digest
        self.plans: dict[tuple[str, bytes], bytes] = {}  # (endpoint, layout digest) → newest plan
        self._lock = threading.RLock()
        self._links: dict[str, list[TrainerLink]] = {}
        self._arenas: dict[bytes, Arena] = {}  # by offer
        self._slots: dict[tuple[str, int], DeviceSlots] = {}  # (arena, GPU here) → its slots, if they lie on a GPU
        self._device_programs: dict[bytes, DeviceProgram] = {}  # idle ones, by the keys of `programs`
        self._exposed: dict[bytes, HostExposed | DeviceExposed] = {}  # likewise; engines may have these mapped
        self.exposed_to: dict[tuple[str, bytes], bytes] = {}  # (endpoint, layout) → last exposure told to the daemon
        self._pushes = 0  # pushes under way; nothing is unmapped during one
        self._unused: list[Arena | DeviceSlots] = []
        self._lookout: Lookout | None = None

    @contextmanager
    def push(self) -> Iterator[None]:
        """Keep everything mapped during a push, which is the body of the `with`."""
        with self._lock:
            self._drop_gone()
            self._pushes += 1
        try:
            yield
        finally:
            with self._lock:
                self._pushes -= 1
                self._drop_gone()

    def take_link(self, endpoint: str) -> TrainerLink:
        """Return a link to the daemon that no other push uses."""
        with self._lock:
            idle = self._links.get(endpoint)
            if idle:
                return idle.pop()
        return TrainerLink(endpoint)

    def announce(self, endpoint: str, model: str) -> None:
        """Tell the daemon, if it listens, that a push is coming: it then asks its engines, which takes a while."""
        link = self.take_link(endpoint)
        link.announce(model)
        self.give_link(link)

    def give_link(self, link: TrainerLink) -> None:
        """Keep `link` for the next push."""
        link.rest()
        with self._lock:
            self._links.setdefault(link.endpoint, []).append(link)

    def close_links(self) -> None:
        """Close every idle link, after sending its queued messages. Called at exit."""
        with self._lock:
            for link in [link for idle in self._links.values() for link in idle]:
                link.close()
            self._links.clear()

    def map_arenas(self, offers: tuple[bytes, ...]) -> list[Arena]:
        """Map the arenas of these offers. Arenas of replaced bridges are unmapped once no push is under way."""
        with self._lock:
            known = {offer: self._arenas.get(offer) or Arena.attach(offer, writable=True) for offer in offers}
            nodes = {arena.name.rpartition("-")[0] for arena in known.values()}
            for offer, arena in list(self._arenas.items()):
                if offer not in known and arena.name.rpartition("-")[0] in nodes:
                    self._drop(offer)
            self._arenas.update(known)
            return [known[offer] for offer in offers]

    def map_slots(self, offer: bytes, device: int) -> DeviceSlots:
        """Map the slots of an arena on a GPU, for use on this process's GPU `device`."""
        wanted = ArenaOffer.unpack(offer)
        with self._lock:
            if (wanted.name, device) not in self._slots:
                self._slots[wanted.name, device] = DeviceSlots.open(wanted, device)
            if self._lookout is None:
                self._lookout = Lookout(self._look, device)
            self._lookout.start()
            return self._slots[wanted.name, device]

    def keep_program(self, key: bytes, program: Program) -> None:
        """Remember what this rank writes in pushes of one plan and layout."""
        with self._lock:
            self.programs[key] = program
            while len(self.programs) > _PROGRAMS:
                forgotten = self.programs.popitem(last=False)[0]
                self._device_programs.pop(forgotten, None)
                self.forget_exposed(forgotten)

    def take_device_program(self, key: bytes) -> DeviceProgram | None:
        """Take out the program's tables on a GPU. One push at a time uses them, because its sums are written there."""
        with self._lock:
            return self._device_programs.pop(key, None)

    def give_device_program(self, key: bytes, program: DeviceProgram) -> None:
        """Keep `program` for the next push."""
        with self._lock:
            if key in self.programs:
                self._device_programs[key] = program

    def take_exposed(self, key: bytes) -> HostExposed | DeviceExposed | None:
        """Take out what the program of `key` exposed last. One push at a time uses it, because it copies there."""
        with self._lock:
            return self._exposed.pop(key, None)

    def give_exposed(self, key: bytes, exposed: HostExposed | DeviceExposed) -> None:
        """Keep `exposed` for the next push, because engines may have it mapped. Close all else of the same layout."""
        self.forget_exposed(key)
        with self._lock:
            if key in self.programs:
                self._exposed[key] = exposed
                return
        exposed.close()

    def forget_exposed(self, key: bytes) -> None:
        """Free the copies in which the layout of `key` was exposed."""
        with self._lock:
            same = [other for other in self._exposed if other[-DIGEST_BYTES:] == key[-DIGEST_BYTES:]]
            gone = [self._exposed.pop(other) for other in same]
        for exposed in gone:
            exposed.close()

    def _look(self) -> bool:
        with self._lock:
            if not self._pushes:
                self._drop_gone()
            return bool(self._slots)

    def _drop_gone(self) -> None:
        """Drop arenas on GPUs whose bridge has ended: until they are unmapped, its successor may find no room."""
        for offer, arena in list(self._arenas.items()):
            if arena.memory is not None and not arena.there:
                self._drop(offer)
        while self._unused and not self._pushes:
            self._unused.pop().close()

    def _drop(self, offer: bytes) -> None:
        arena = self._arenas.pop(offer)
        self._unused.append(arena)
        self._unused += [self._slots.pop(key) for key in list(self._slots) if key[0] == arena.name]


class _Process:
    """The memory of this process. A forked child begins with an empty one and never frees its parent's.

    CUDA does not work in a forked child, and freeing memory that CUDA knows would end the child.
    """

    def __init__(self) -> None:
        self.memory = RankMemory()
        self.left: list[RankMemory] = []

    def forked(self) -> None:
        self.left.append(self.memory)
        self.memory = RankMemory()


_PROCESS = _Process()
atexit.register(lambda: _PROCESS.memory.close_links())
os.register_at_fork(after_in_child=_PROCESS.forked)


def memory() -> RankMemory:
    """Return the memory of this process."""
    return _PROCESS.memory
