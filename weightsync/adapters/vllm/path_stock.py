"""What vLLM's own backends share: an update is opened, given whole tensors, and closed; nothing can be looked at."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import contextmanager
from typing import TYPE_CHECKING

from weightsync.adapters.http import EngineAnswer
from weightsync.adapters.vllm.path import EnginePath
from weightsync.adapters.vllm.server import OUT_OF_STEP, first_names
from weightsync.errors import LocalProtocolError
from weightsync.plan.fused import group_key

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from weightsync.adapters.vllm.server import Server
    from weightsync.plan.manifest import Manifest

__all__ = ["StockPath", "broken_groups"]


def broken_groups(names: Sequence[str]) -> list[str]:
    """Sentences about fused groups that did not come whole, as far as names can tell: q, k and v always go together,
    of the others a group must have what any group of its kind has.
    """
    groups: dict[str, dict[str, str]] = {}  # group → member → a tensor of it
    kinds: dict[str, set[str]] = {"qkv": {"q_proj", "k_proj", "v_proj"}}
    for name in names:
        key = group_key(name)
        if key != name and name.endswith(".weight"):
            member = name.split(".")[-2]
            groups.setdefault(key, {})[member] = name
            kinds.setdefault(_kind(key), set()).add(member)
    return [
        f"{next(iter(found.values()))!r} comes without {', '.join(sorted(lacking))} of its fused group"
        for key, found in groups.items()
        if (lacking := kinds[_kind(key)].difference(found))
    ]


def _kind(group: str) -> str:
    return group[group.rfind("[") + 1 : -1]


class StockPath(EnginePath):
    """One of vLLM's own backends."""

    def __init__(self, server: Server, *, draft: bool) -> None:
        super().__init__(server, draft=draft)
        self._manifest: Manifest | None = None
        self._whole = False  # the last update was one of ours, and ended well: there is nothing to repair
        self._opened = False  # by us, and not closed since
        self._out_of_step = ""  # the call that failed, and left workers' answers unread

    async def accept(self, manifest: Manifest, *, whole: bool, deadline: float) -> tuple[str, ...] | None:
        """The server cannot be asked which tensors it knows: unknown ones fail while they are loaded."""
        if self._out_of_step:
            raise self.refused(
                f"{self._out_of_step}; {OUT_OF_STEP}",
                "restart it (and weightsyncd, where its /metrics are off); with our plugin, it would not have to be",
            )
        if broken := broken_groups(manifest.tensors.names):
            raise self.refused(
                first_names(broken, len(broken)),
                "send fused groups whole: vllm would leave the rest of a layer uninitialised",
            )
        return None

    async def begin(
        self, version: int, manifest: Manifest, offers: Sequence[Sequence[bytes]], *, torn: bool, deadline: float
    ) -> None:
        self._manifest = manifest
        forgets = not self.server.profile.keeps_version  # … that it was torn, when this daemon or it restarts
        repair, self._whole = torn or (forgets and not self._whole), False
        with self._watched():
            await self._attach(offers, deadline=deadline)
            if self._opened:
                await self._close(deadline=deadline)
            if repair:  # an update that failed left layers half-collected: opening and closing one puts them back
                await self._open(deadline=deadline)
                await self._close(deadline=deadline)
            await self._open(deadline=deadline)

    @abstractmethod
    async def _attach(self, offers: Sequence[Sequence[bytes]], *, deadline: float) -> None:
        """Prepare its workers for what will be sent."""

    async def finish(self, *, deadline: float) -> None:
        with self._watched():
            await self._close(deadline=deadline)
        self._manifest = None
        self._whole = True

    def _updated(self) -> Manifest:
        """The manifest of the update that is open."""
        if self._manifest is None:
            raise LocalProtocolError("no update is open", engine=self.server.engine, hint="begin first")
        return self._manifest

    async def _open(self, *, deadline: float) -> None:
        """Open an update. One that somebody else has left open is closed, where trying may cost nothing."""
        try:
            await self.start(deadline=deadline)
        except EngineAnswer:
            if self.server.world > 1:
                raise
            await self._close(deadline=deadline)
            await self.start(deadline=deadline)
        self._opened = True

    async def _close(self, *, deadline: float) -> None:
        self._opened = False
        await self.server.http.post("/finish_weight_update", None, deadline=deadline)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except EngineAnswer as answer:
            self._opened = False  # a failed update is one that vLLM closes
            if self.server.world > 1:
                self._out_of_step = answer.message
            raise
