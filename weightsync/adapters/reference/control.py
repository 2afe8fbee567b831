"""The adapter of one reference engine, in the daemon: one HTTP call for each step of a push."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from weightsync.adapters.base import EngineAdapter, EngineInfo
from weightsync.adapters.connection import HttpClient
from weightsync.adapters.places import ToldPlaces
from weightsync.adapters.reference.commands import MANIFESTS_KEPT
from weightsync.adapters.verify import Verifier
from weightsync.errors import CodecError, ConfigError, EngineError, EngineLost, EngineRefused, RemoteProtocolError
from weightsync.plan.residents import ResidentBoxes
from weightsync.plan.told import ToldExposures

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightsync.adapters import EngineSpec
    from weightsync.adapters.base import PauseMode
    from weightsync.plan.boxes import Words
    from weightsync.plan.exposure import Exposures
    from weightsync.plan.manifest import Manifest

__all__ = ["ReferenceAdapter"]

_PROBLEMS_SHOWN = 5

_Answer = TypeVar("_Answer")


class _Info(msgspec.Struct, frozen=True):
    software: str
    kind: str
    tp_size: int
    weight_version: int | None
    paused: bool
    torn: bool
    incarnation: str


class _Accepted(msgspec.Struct, frozen=True):
    untouched: tuple[str, ...]


class _Drawn(msgspec.Struct, frozen=True):
    why_not: str


class _Problem(msgspec.Struct, frozen=True):
    """The body of an unsuccessful answer; every field may be missing."""

    error: str = ""
    problems: tuple[str, ...] = ()
    problem_count: int = 0
    unknown_manifest: bool = False
    torn: bool = False


class _Refusal(EngineError):
    """An unsuccessful answer, before its caller has decided what it means for the push."""

    def __init__(self, status: int, problem: _Problem, engine: str, phase: str) -> None:
        super().__init__(f"{problem.error or 'no reason given'} (HTTP {status})", engine=engine, phase=phase)
        self.status = status
        self.problem = problem


class ReferenceAdapter(EngineAdapter):
    """Drives one reference engine over kept-alive connections. The engine's key is sent, and never shown."""

    def __init__(self, spec: EngineSpec) -> None:
        self.name = spec.name
        self.url = spec.url
        self._info: EngineInfo | None = None  # as last probed
        self._shown, self._places = ToldExposures(), ToldPlaces(spec.name)
        self._drew_well = True  # False from a draw, or from showing places, until the push is verified
        self._verifiers: dict[tuple[str, bytes], Verifier] = {}  # by incarnation and manifest's digest
        try:
            self._http = HttpClient(spec.url, {"Authorization": f"Bearer {spec.api_key}"} if spec.api_key else {})
        except ValueError as error:
            raise ConfigError(
                f"engine {spec.name!r} cannot be reached by {spec.url!r}: {error}",
                engine=spec.name,
                hint="a URL such as http://127.0.0.1:8000",
            ) from error

    def __repr__(self) -> str:
        return f"ReferenceAdapter({self.name!r}, {self.url!r})"

    async def probe(self, *, deadline: float) -> EngineInfo:
        info = self._parse(await self._call("GET", "/info", deadline), _Info, "probe")
        if info.kind != "reference":
            what = f"engine {self.name} is of kind {info.kind!r}, not a reference engine"
            raise EngineError(what, engine=self.name, phase="probe")
        self._info = EngineInfo(
            software=info.software,
            profile="reference: its own endpoints, the only protocol it has",
            tp_size=info.tp_size,
            version=info.weight_version,
            paused=info.paused,
            torn=info.torn,
            incarnation=info.incarnation,
        )
        return self._info

    async def accept(self, manifest: Manifest, *, deadline: float) -> tuple[str, ...]:
        """See the base class. The engine returns only the first 32 of the names left alone."""
        try:
            body = await self._call("PUT", f"/manifest/{manifest.digest.hex()}", deadline, manifest.pack())
        except _Refusal as refusal:
            if refusal.status != HTTPStatus.BAD_REQUEST:
                raise
            problems = refusal.problem.problems or (refusal.message,)
            more = max(refusal.problem.problem_count, len(problems)) - _PROBLEMS_SHOWN
            raise EngineRefused(
                "; ".join(problems[:_PROBLEMS_SHOWN]) + (f"; and {more} more" if more > 0 else ""),
                engine=self.name,
                phase="accept",
            ) from refusal
        self._shown.forget()  # send exposures whole next time: the engine may have restarted
        untouched = self._parse(body, _Accepted, "accept").untouched
        await self._verifier(manifest, deadline)  # made now, while the engine serves, and not while it is paused
        return untouched

    async def pause(self, mode: PauseMode, *, deadline: float) -> None:
        await self._post("/pause", {"mode": mode}, deadline)

    async def begin(
        self, version: int, manifest: Manifest, offers: Sequence[Sequence[bytes]], *, deadline: float
    ) -> None:
        """See the base class. Shows the manifest again if the engine has forgotten it."""
        order = {"version": version, "manifest": manifest.digest.hex(), "offers": offers}
        try:
            await self._post("/begin", order, deadline)
        except _Refusal as refusal:
            if not refusal.problem.unknown_manifest:
                raise
            await self.accept(manifest, deadline=deadline)
            await self._post("/begin", order, deadline)

    async def load(self, bucket: int, tickets: Sequence[bytes], *, deadline: float) -> None:
        await self._post("/load", {"bucket": bucket, "tickets": tickets}, deadline)

    def draws(self, manifest: Manifest) -> bool:
        """See the base class. After a push in place that was not verified, the next push goes through slots."""
        return self._drew_well

    async def draw(self, exposures: Exposures, *, deadline: float) -> str:
        self._drew_well = False  # until it is verified
        with self._shown.unless_it_fails():
            body = await self._call("POST", "/draw", deadline, self._shown.tell(exposures))
            return self._parse(body, _Drawn, "draw").why_not

    async def places(self, *, deadline: float) -> Exposures | str:
        info = self._info or await self.probe(deadline=deadline)
        self._drew_well = False  # until it is verified
        body = msgspec.json.encode({"known": self._places.known})
        return self._places.of(await self._bins("POST", "/places", deadline, body), info.tp_size)

    async def finish(self, version: int, *, deadline: float) -> None:
        await self._post("/finish", {"version": version}, deadline)

    async def verify(self, manifest: Manifest, expected: Words, *, deadline: float) -> int:
        verifier = await self._verifier(manifest, deadline)
        ranks = await self._bins("GET", f"/fingerprints/{manifest.digest.hex()}", deadline)
        compared = verifier.compare(ranks, expected)
        self._drew_well = True
        return compared

    async def resume(self, *, deadline: float) -> None:
        await self._call("POST", "/resume", deadline)

    async def close(self) -> None:
        await self._http.close()

    async def _verifier(self, manifest: Manifest, deadline: float) -> Verifier:
        """Return the verifier for this manifest and incarnation; asks the engine once, and keeps the latest few."""
        info = self._info or await self.probe(deadline=deadline)
        key = (info.incarnation, manifest.digest)
        verifier = self._verifiers.pop(key, None)
        if verifier is None:
            ranks = await self._bins("GET", f"/residents/{manifest.digest.hex()}", deadline)
            if len(ranks) != info.tp_size:
                raise EngineError(
                    f"{len(ranks)} ranks say what they hold, not {info.tp_size}", engine=self.name, phase="verify"
                )
            try:
                verifier = Verifier([ResidentBoxes.unpack(rank, manifest.tensors) for rank in ranks], manifest.tensors)
            except CodecError as error:
                raise EngineError(
                    f"what engine {self.name} says of its residents makes no sense: {error.message}",
                    engine=self.name,
                    phase="verify",
                ) from error
        self._verifiers[key] = verifier  # now the last to be forgotten
        while len(self._verifiers) > MANIFESTS_KEPT:
            del self._verifiers[next(iter(self._verifiers))]
        return verifier

    async def _bins(self, method: str, path: str, deadline: float, content: bytes = b"") -> list[bytes]:
        body = await self._call(method, path, deadline, content)
        try:
            return msgspec.msgpack.decode(body, type=list[bytes])
        except (msgspec.DecodeError, RecursionError) as error:
            raise EngineError(
                f"an answer that is none of a reference engine: {error}", engine=self.name, phase=path.split("/", 2)[1]
            ) from error

    async def _post(self, path: str, body: dict[str, Any], deadline: float) -> None:
        await self._call("POST", path, deadline, msgspec.json.encode(body))

    async def _call(self, method: str, path: str, deadline: float, content: bytes = b"") -> bytes:
        """Send a request and return the body of a successful answer.

        Raises `EngineLost` without an answer, `_Refusal` for an unsuccessful one, `EngineError` if it is not HTTP.
        """
        phase = path.split("/", 2)[1]
        left = max(deadline - monotonic(), 0)
        try:
            async with asyncio.timeout(left):
                seconds = {"X-Timeout-Seconds": f"{min(left, 3600):.3f}"}
                status, body = await self._http.request(method, path, content, headers=seconds)
        except TimeoutError as error:
            raise EngineLost(f"no answer to {method} {path} in {left:.1f} s", engine=self.name, phase=phase) from error
        except (OSError, EOFError, UnicodeError) as error:
            reason = "the connection was closed" if isinstance(error, EOFError) else str(error)
            raise EngineLost(f"{method} {path}: {reason}", engine=self.name, phase=phase) from error
        except RemoteProtocolError as error:
            raise EngineError(f"{method} {path}: {error.message}", engine=self.name, phase=phase) from error
        if status == HTTPStatus.OK:
            return body
        if status == HTTPStatus.GATEWAY_TIMEOUT:
            raise EngineLost(f"{method} {path} did not end in {left:.1f} s", engine=self.name, phase=phase)
        try:
            problem = msgspec.json.decode(body, type=_Problem)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            problem = _Problem(error=f"{method} {path} was not answered by a reference engine")
        raise _Refusal(status, problem, self.name, phase)

    def _parse(self, body: bytes, kind: type[_Answer], phase: str) -> _Answer:
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise EngineError(
                f"an answer that is none of a reference engine: {error}", engine=self.name, phase=phase
            ) from error
