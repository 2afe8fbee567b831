"""The common part of paths through vLLM's own backends: an update is opened, given whole tensors, and closed."""

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
    """Return a sentence for each fused group that is not whole, as far as names can tell.

    q, k and v always go together. Any other group must have every member that any group of its kind has.
    """
    groups: dict[str, dict[str, str]] = {}  # group → member → its tensor
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
    """The path through one of vLLM's own backends. What the server holds can be neither asked for nor compared."""

    def __init__(self, server: Server, *, draft: bool) -> None:
        super().__init__(server, draft=draft)
        self._manifest: Manifest | None = None
        self._whole = False  # the last update was ours and ended well, so there is nothing to repair
        self._opened = False  # we have opened an update and not closed it
        self._out_of_step = ""  # a call that failed and left workers' answers unread

    async def accept(self, manifest: Manifest, *, whole: bool, deadline: float) -> tuple[str, ...] | None:
        """See the base class. The server does not tell which tensors it knows: an unknown one fails to load."""
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
        forgets = not self.server.profile.keeps_version  # a restarted daemon does not learn that the server is torn
        repair, self._whole = torn or (forgets and not self._whole), False
        with self._watched():
            await self._attach(offers, deadline=deadline)
            if self._opened:
                await self._close(deadline=deadline)
            if repair:  # a failed update left layers half-collected; opening and closing one puts them back
                await self._open(deadline=deadline)
                await self._close(deadline=deadline)
            await self._open(deadline=deadline)

    @abstractmethod
    async def _attach(self, offers: Sequence[Sequence[bytes]], *, deadline: float) -> None:
        """Prepare the workers for the way in which buckets will come."""

    async def finish(self, *, deadline: float) -> None:
        with self._watched():
            await self._close(deadline=deadline)
        self._manifest = None
        self._whole = True

    def _updated(self) -> Manifest:
        """Return the manifest of the open update. Raises `LocalProtocolError` if none is open."""
        if self._manifest is None:
            raise LocalProtocolError("no update is open", engine=self.server.engine, hint="begin first")
        return self._manifest

    async def _open(self, *, deadline: float) -> None:
        """Open an update. With a single worker, first close one that another client has left open.

        With several workers the failed call has put the server out of step, so the error is raised.
        """
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
            self._opened = False  # vLLM closes an update that fails
            if self.server.world > 1:
                self._out_of_step = answer.message
            raise
