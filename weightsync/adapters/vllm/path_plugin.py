"""The paths through our plugin: by vLLM's own weight-update routes, or by `/collective_rpc`."""

from __future__ import annotations

from base64 import b64decode, b64encode
from secrets import token_hex
from time import monotonic
from typing import TYPE_CHECKING, Any

from weightsync.adapters.held import HeldSums
from weightsync.adapters.http import EngineAnswer, at_once
from weightsync.adapters.places import ToldPlaces
from weightsync.adapters.vllm.path import EnginePath
from weightsync.adapters.vllm.server import first_names, ticket_seconds, told_of_replay
from weightsync.errors import EngineError
from weightsync.plan.replay_facts import NOT_WHOLE
from weightsync.plan.told import ToldExposures, ToldManifests

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.adapters.vllm.server import Server
    from weightsync.plan.exposure import Exposures
    from weightsync.plan.manifest import Manifest

__all__ = ["ExtensionPath", "PluginPath"]


def _text(data: bytes) -> str:
    return b64encode(data).decode("ascii")


def _bytes(answer: dict[str, Any], key: str, path: EnginePath) -> bytes:
    """Decode bytes from a worker's answer. Raises `EngineError`."""
    try:
        return b64decode(answer[key], validate=True)
    except (KeyError, TypeError, ValueError) as error:
        engine = path.server.engine
        raise EngineError(f"the workers of {engine} answered without {key!r}", engine=engine) from error


class ExtensionPath(EnginePath):
    """Does everything by `/collective_rpc`. Works from vLLM 0.19 on, whatever backend the server was started with."""

    name = "extension"
    keeps_version = True

    def __init__(self, server: Server, *, draft: bool) -> None:
        super().__init__(server, draft=draft)
        self._told, self._shown, self._places = ToldManifests(), ToldExposures(), ToldPlaces(server.engine)
        self._token = ""  # a random name for each update, so that workers tell its steps from another daemon's

    async def incarnation(self, *, deadline: float) -> str:
        return (await self.server.hello(deadline=deadline))[0].incarnation

    async def weight_version(self, *, deadline: float) -> str:
        """See the base class. If the server keeps no version, its workers do."""
        if self.server.profile.keeps_version:
            return await super().weight_version(deadline=deadline)
        said = {worker.weight_version for worker in await self.server.hello(deadline=deadline)}
        return said.pop() if len(said) == 1 else next((text for text in said if ">" in text), "default")

    async def accept(self, manifest: Manifest, *, whole: bool, deadline: float) -> tuple[str, ...]:
        """See the base class. The workers compare every name with the model they hold."""
        self._told.forget()  # send the manifest whole: the engine may have restarted
        self._shown.forget()
        asked = {"manifest": _text(self._told.tell(manifest)), "draft": self.draft}
        untouched: dict[str, None] = {}
        with self._told.unless_it_fails():
            fits = await self.server.workers("check", deadline=deadline, **asked)
        for fit in fits:
            if fit["unknowns"]:
                names = first_names([repr(name) for name in fit["unknown"]], fit["unknowns"])
                raise self.refused(f"the model has no parameter for {names}")
            if fit["partials"]:
                raise self.refused(
                    first_names(fit["partial"], fit["partials"]),
                    "send every layer whole: vllm would leave the rest of it uninitialised",
                )
            untouched.update(dict.fromkeys(fit["untouched"]))
        if untouched and whole:
            names = first_names([repr(name) for name in untouched], len(untouched))
            raise self.refused(
                f"its weights are torn or asleep, and this would leave {names} as they are",
                "push all tensors of the model",
            )
        return tuple(untouched)

    async def begin(
        self,
        version: int,
        manifest: Manifest,
        offers: Sequence[Sequence[bytes]],
        *,
        torn: bool,
        pull: bool = False,
        anew: bool = False,
        deadline: float,
    ) -> None:
        """See the base class; `pull` and `anew` as in the `Request` of extension.py."""
        await self._open(deadline=deadline)
        self._token = token_hex(32)
        with self._told.unless_it_fails():
            asked = {
                "version": version,
                "manifest": _text(self._told.tell(manifest)),
                "offers": [[_text(offer) for offer in worker] for worker in offers],
                **({"pull": True} if pull else {}),
                **({"anew": True} if anew else {}),
            }
            await self._step("begin", asked, deadline=deadline)

    async def load(self, bucket: int, tickets: Sequence[bytes], *, deadline: float) -> None:
        await self.load_several(bucket, [tickets], deadline=deadline)

    async def load_several(self, first: int, tickets: Sequence[Sequence[bytes]], *, deadline: float) -> None:
        """See the base class. Sends all of them in one call."""
        asked = {"bucket": first, "tickets": [[_text(ticket) for ticket in of_bucket] for of_bucket in tickets]}
        await self._step("load", asked, deadline=deadline)

    async def draw(self, exposures: Exposures, *, deadline: float) -> str:
        """Have all workers read what they need out of the trainer's memory. Returns why a worker cannot, or ""."""
        of = {"update": self._token, **({"draft": True} if self.draft else {})}
        shown, seconds = _text(self._shown.tell(exposures)), ticket_seconds(deadline, monotonic())
        with self._shown.unless_it_fails():
            answers = await self.server.workers("draw", deadline=deadline, exposures=shown, seconds=seconds, **of)
        return next((str(why) for answer in answers if (why := answer.get("why_not", NOT_WHOLE))), "")

    async def places(self, *, deadline: float) -> Exposures | str:
        """Return the places of all workers, or why a worker has none."""
        of = {"update": self._token, **({"draft": True} if self.draft else {})}
        known = [_text(digest) for digest in self._places.known]
        answers = await self.server.workers("places", deadline=deadline, known=known, **of)
        return self._places.of([_bytes(one, "shown", self) for one in answers], self.server.world)

    async def finish(self, *, deadline: float) -> None:
        await self.server.workers("finish", deadline=deadline, draft=self.draft, update=self._token)

    async def set_weight_version(self, text: str, *, deadline: float) -> None:
        kept = super().set_weight_version(text, deadline=deadline)
        if not text.isdecimal():
            await kept
            return
        draft = {"draft": True} if self.draft else {}
        _, answers = await at_once(kept, self.server.workers("serve", deadline=deadline, version=int(text), **draft))
        self.replay = told_of_replay(answers, self.server.engine)

    async def sums(self, manifest: Manifest, *, deadline: float) -> list[HeldSums]:
        """Ask every worker what it holds of the push that has ended."""
        answers = await self._asked_of(manifest, "sums", deadline)
        return [
            HeldSums(_bytes(one, "boxes", self), _bytes(one, "sums", self), int(one.get("pulled", 0)))
            for one in answers
        ]

    async def boxes(self, manifest: Manifest, *, deadline: float) -> list[bytes]:
        """Ask every worker for the boxes behind its `sums`, as packed `ResidentBoxes`."""
        return [_bytes(one, "boxes", self) for one in await self._asked_of(manifest, "boxes", deadline)]

    async def _asked_of(self, manifest: Manifest, do: str, deadline: float) -> list[dict[str, Any]]:
        draft = {"draft": True} if self.draft else {}
        return await self.server.workers(do, deadline=deadline, manifest=_text(manifest.digest), **draft)

    async def _open(self, *, deadline: float) -> None:
        """Do nothing: the workers open the update in their `begin`."""

    async def _step(self, do: str, asked: dict[str, Any], *, deadline: float) -> None:
        draft = {"draft": True} if self.draft else {}
        await self.server.workers(do, deadline=deadline, **asked, **self._terms(deadline), **draft)

    def _terms(self, deadline: float) -> dict[str, Any]:
        return {"seconds": ticket_seconds(deadline, monotonic()), "update": self._token}


class PluginPath(ExtensionPath):
    """Sends the steps by vLLM's own routes, so that vLLM's state, metrics and logs show the update."""

    name = "plugin"

    async def _open(self, *, deadline: float) -> None:
        try:
            await self.start(deadline=deadline)
        except EngineAnswer as answer:
            if "already active" not in answer.reason:
                raise
            await self.attempt("/update_weights", {"update_info": {"do": "abandon"}}, deadline=deadline)
            await self.attempt("/finish_weight_update", None, deadline=deadline)  # 0.22 leaves a failed update open
            await self.start(deadline=deadline)

    async def finish(self, *, deadline: float) -> None:
        if not self.server.profile.engine_reloads:
            await self._update({"do": "check-whole"}, deadline=deadline)
        await self.server.http.post("/finish_weight_update", None, deadline=deadline)

    async def _step(self, do: str, asked: dict[str, Any], *, deadline: float) -> None:
        """Send one step. The start route has said already whether the update is of the draft model."""
        await self._update({"do": do, **asked, **self._terms(deadline)}, deadline=deadline)

    async def _update(self, info: dict[str, Any], *, deadline: float) -> None:
        await self.server.http.post("/update_weights", {"update_info": info}, deadline=deadline)
