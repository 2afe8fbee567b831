"""The base class of all paths into a vLLM server."""

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
    """One path into a server. Each incarnation of the server gets a new one."""

    name: str
    transport = "mapped"
    keeps_version = False  # whether the server's workers keep the weight version

    def __init__(self, server: Server, *, draft: bool) -> None:
        self.server = server
        self.draft = draft
        self._remembered = "default"
        self.replay: ReplayFacts | None = None  # what our plugin, if it is there, said of the last push

    async def weight_version(self, *, deadline: float) -> str:
        """Return the string that says which version the server holds, or that it is torn."""
        if self.server.profile.keeps_version:
            answer = await self.server.http.get("/weight_info", deadline=deadline)
            return str(field(answer, "weight_version", str, "/weight_info", self.server.engine))
        return self._remembered

    async def set_weight_version(self, text: str, *, deadline: float) -> None:
        """Have the server keep this string."""
        if self.server.profile.keeps_version:
            await self.server.http.post("/update_weight_version", {"new_version": text}, deadline=deadline)
        self._remembered = text

    async def incarnation(self, *, deadline: float) -> str:
        """Return a string that changes when the server restarts, if its metrics do not tell; "" if nothing does."""
        return ""

    @abstractmethod
    async def accept(self, manifest: Manifest, *, whole: bool, deadline: float) -> tuple[str, ...] | None:
        """See `EngineAdapter.accept`. With `whole`, the push may leave no parameter as it is."""

    @abstractmethod
    async def begin(
        self, version: int, manifest: Manifest, offers: Sequence[Sequence[bytes]], *, torn: bool, deadline: float
    ) -> None:
        """Open an update, whatever state an earlier one left."""

    @abstractmethod
    async def finish(self, *, deadline: float) -> None:
        """Close the update. The adapter sets the weight version afterwards."""

    async def start(self, *, deadline: float) -> None:
        """Open an update by vLLM's own route."""
        route = "/start_draft_weight_update" if self.draft else "/start_weight_update"
        await self.server.http.post(route, {}, deadline=deadline)  # up to 0.25 a body is required

    async def attempt(self, route: str, body: Any, *, deadline: float) -> bool:
        """POST a request that may be refused, and return whether it succeeded."""
        try:
            await self.server.http.post(route, body, deadline=deadline)
        except EngineAnswer:
            return False
        return True

    def refused(self, why: str, hint: str | None = None) -> EngineRefused:
        """Make the error for `accept` to raise."""
        return EngineRefused(why, engine=self.server.engine, phase="accept", hint=hint)
