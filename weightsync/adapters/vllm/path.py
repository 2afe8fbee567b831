"""What every way into a vLLM server can do."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from weightsync.adapters.base import LoadsBuckets
from weightsync.adapters.http import EngineAnswer
from weightsync.adapters.vllm.server import field
from weightsync.errors import EngineRefused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.adapters.vllm.server import Server
    from weightsync.plan.manifest import Manifest
    from weightsync.plan.replay_facts import ReplayFacts

__all__ = ["EnginePath"]


class EnginePath(LoadsBuckets):
    """One way into a server. Made anew for each incarnation of it."""

    name: str
    transport = "mapped"
    keeps_version = False  # whether its workers keep the weight version

    def __init__(self, server: Server, *, draft: bool) -> None:
        self.server = server
        self.draft = draft
        self._remembered = "default"
        self.replay: ReplayFacts | None = None  # what its workers said of the last push, where they have our plugin

    async def weight_version(self, *, deadline: float) -> str:
        """The string that says which version it serves, or that it is torn."""
        if self.server.profile.keeps_version:
            answer = await self.server.http.get("/weight_info", deadline=deadline)
            return str(field(answer, "weight_version", str, "/weight_info", self.server.engine))
        return self._remembered

    async def set_weight_version(self, text: str, *, deadline: float) -> None:
        """Have it keep this string."""
        if self.server.profile.keeps_version:
            await self.server.http.post("/update_weight_version", {"new_version": text}, deadline=deadline)
        self._remembered = text

    async def incarnation(self, *, deadline: float) -> str:
        """What changes when it restarts, for a server whose metrics do not tell; "" where nothing does."""
        return ""

    @abstractmethod
    async def accept(self, manifest: Manifest, *, whole: bool, deadline: float) -> tuple[str, ...] | None:
        """See `EngineAdapter.accept`; `whole`: nothing may be left as it is."""

    @abstractmethod
    async def begin(
        self, version: int, manifest: Manifest, offers: Sequence[Sequence[bytes]], *, torn: bool, deadline: float
    ) -> None:
        """Open an update, whatever an earlier one left."""

    @abstractmethod
    async def finish(self, *, deadline: float) -> None:
        """Close the update; what the server says of its version comes afterwards."""

    async def start(self, *, deadline: float) -> None:
        """vLLM's own opening of an update."""
        route = "/start_draft_weight_update" if self.draft else "/start_weight_update"
        await self.server.http.post(route, {}, deadline=deadline)  # up to 0.25 there has to be a body

    async def attempt(self, route: str, body: Any, *, deadline: float) -> bool:
        """POST what may well be refused; whether it was not."""
        try:
            await self.server.http.post(route, body, deadline=deadline)
        except EngineAnswer:
            return False
        return True

    def refused(self, why: str, hint: str | None = None) -> EngineRefused:
        """The error for `accept` to raise."""
        return EngineRefused(why, engine=self.server.engine, phase="accept", hint=hint)
