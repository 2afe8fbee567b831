"""The engine's state, and what it may do now: generate, pause, take new weights. No HTTP, no tensor, no torch.

Requests and control calls run in threads of their own and take turns at the workers, for one decode step or one command
each. So a bucket is loaded between two steps, and requests of a paused engine wait at a closed gate.

From `begin` to the `resume` after `finish` the engine is torn. It serves in that time only if the push asked for no
pause. Then a failed command closes the gate, and so does a request that finds the update stalled.
"""

from __future__ import annotations

import itertools
import logging
import random
import uuid
from collections import deque
from contextlib import contextmanager
from http import HTTPStatus
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from weightsync.adapters.reference.admission import Verdict, admit, held_names
from weightsync.adapters.reference.commands import (
    MANIFESTS_KEPT,
    Accept,
    Begin,
    Checksums,
    Draw,
    Fingerprints,
    Finish,
    Load,
    Places,
    Reply,
    Residents,
    Step,
)
from weightsync.adapters.reference.gate import Gate, RequestError
from weightsync.adapters.reference.sharding import checkpoint_tensors
from weightsync.adapters.reference.turns import Turns
from weightsync.errors import CodecError, EngineLost
from weightsync.plan.manifest import Manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from weightsync.adapters.base import PauseMode
    from weightsync.adapters.reference.commands import Command
    from weightsync.adapters.reference.config import ModelConfig
    from weightsync.adapters.reference.group import WorkerGroup

__all__ = ["Engine", "Generated"]

logger = logging.getLogger(__name__)

_LOST_SECONDS = 90.0  # after a command's deadline; longer than a rank waits for another in a collective
_STALLED_SECONDS = 30.0  # without a step of the open update, while the engine serves


class Generated(NamedTuple):
    """A finished request."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["length", "stop", "abort"]
    weight_version: int | None


class _Accepted(NamedTuple):
    manifest: Manifest
    held: frozenset[str]  # names it brings, under the engine's names


class Engine:
    """One engine, over its workers. `on_lost` is called, from any thread, when a worker is lost."""

    def __init__(
        self, config: ModelConfig, workers: WorkerGroup, *, name: str, blank: bool, on_lost: Callable[[], None]
    ) -> None:
        self.config = config
        self.name = name
        self.incarnation = uuid.uuid4().hex
        self._workers = workers
        self._on_lost = on_lost
        self._known = frozenset(checkpoint_tensors(config))
        self._turns = Turns()
        self._accepted: dict[bytes, _Accepted] = {}
        # Any thread reads these. Only the thread that has the turn writes them, except for `_ended`.
        self.version: int | None = None
        self.blank = blank  # holds no weights at all yet
        self._updating: int | None = None  # version of the open update
        self._dirty: frozenset[str] = frozenset()  # names overwritten since the last resume, and not verified yet
        self._finished = False  # the update of the dirty names is whole; the next resume confirms it
        self._touched = 0.0  # time of the update's last step
        self._flushes = 0  # rises when all caches are dropped
        self._ended: deque[int] = deque()  # ended sequences, whose caches the workers drop at the next step
        self._gate = Gate()
        self._sequences = itertools.count(1)

    @property
    def torn(self) -> bool:
        """Whether an update began and was not confirmed: it is open, has broken off, or failed its verification."""
        return self._updating is not None or bool(self._dirty)

    @property
    def paused(self) -> bool:
        """Whether requests do not go on."""
        return self._gate.paused

    def info(self) -> dict[str, Any]:
        """Describe the engine and its state, as `/info` answers."""
        config = self.config
        return {
            "kind": "reference",
            "name": self.name,
            "tp_size": self._workers.tp_size,
            "weight_version": self.version,
            "paused": self.paused,
            "torn": self.torn,
            "updating": self._updating,
            "blank": self.blank,
            "running": self._gate.running,
            "incarnation": self.incarnation,
            "worker_pids": [process.pid for process in self._workers.processes],
            "model": {
                "architecture": config.architecture,
                "dtype": config.dtype,
                "num_hidden_layers": config.num_hidden_layers,
                "hidden_size": config.hidden_size,
                "vocab_size": config.vocab_size,
                "num_experts": config.num_experts,
                "tie_word_embeddings": config.tie_word_embeddings,
            },
        }

    # -- updates ---------------------------------------------------------------------------------------------------

    def accept(self, digest: bytes, packed: bytes, *, deadline: float) -> Verdict:
        """Judge a packed manifest and, if there is no problem, have workers plan it. Touches no weights."""
        try:
            manifest = Manifest.unpack(packed)
        except CodecError as error:
            raise RequestError(HTTPStatus.BAD_REQUEST, str(error), problems=[str(error)]) from error
        if manifest.digest != digest:
            problem = f"the manifest's digest is {manifest.digest.hex()}, not the one in the path"
            raise RequestError(HTTPStatus.BAD_REQUEST, problem, problems=[problem])
        with self._turn(deadline):
            verdict = admit(self.config, manifest, self._required())
            if not verdict.problems:
                self._expect(self._call(Accept(packed), deadline))
                self._accepted.pop(digest, None)
                self._accepted[digest] = _Accepted(manifest, frozenset(held_names(self.config, manifest).values()))
                while len(self._accepted) > MANIFESTS_KEPT:
                    del self._accepted[next(iter(self._accepted))]
        return verdict

    def begin(self, version: int, digest: bytes, offers: Sequence[Sequence[bytes]], *, deadline: float) -> None:
        """Open an update. It replaces and repairs an unfinished one, so it must bring everything that one touched."""
        if len(offers) != self._workers.tp_size:
            raise RequestError(HTTPStatus.BAD_REQUEST, f"offers for {len(offers)} ranks, not {self._workers.tp_size}")
        with self._turn(deadline):
            accepted = self._accepted.get(digest)
            if accepted is None:
                raise RequestError(HTTPStatus.CONFLICT, "no such manifest was accepted", unknown_manifest=True)
            missing = self._required() - accepted.held
            if missing:
                name = min(missing)
                raise RequestError(
                    HTTPStatus.CONFLICT,
                    f"the engine holds no whole version of {len(missing)} tensors that this manifest leaves out, "
                    f"such as {name!r}",
                )
            # Torn from here on, even before the first load: only a whole update ends this.
            self._dirty |= accepted.held
            with self._part_of_update():
                self._expect(self._call_each(lambda rank: Begin(digest, tuple(offers[rank]), deadline), deadline))
            self._updating = version
            self._finished = False

    def load(self, bucket: int, tickets: Sequence[bytes], *, deadline: float) -> None:
        """Load one bucket of the open update on every rank."""
        if len(tickets) != self._workers.tp_size:
            raise RequestError(HTTPStatus.BAD_REQUEST, f"tickets for {len(tickets)} ranks, not {self._workers.tp_size}")
        with self._turn(deadline):
            if self._updating is None:
                raise RequestError(HTTPStatus.CONFLICT, "no update is open: begin first")
            with self._part_of_update():
                self._expect(self._call_each(lambda rank: Load(bucket, tickets[rank], deadline), deadline))

    def draw(self, exposures: bytes, *, deadline: float) -> str:
        """Read the open update's tensors out of a trainer's memory. Returns why a rank cannot, or ""."""
        with self._turn(deadline):
            if self._updating is None:
                raise RequestError(HTTPStatus.CONFLICT, "no update is open: begin first")
            with self._part_of_update():
                replies = self._expect(self._call(Draw(exposures, deadline), deadline))
            return next((reply.data.decode() for reply in replies if reply.data), "")

    def places(self, known: Sequence[bytes], *, deadline: float) -> list[bytes]:
        """Return each rank's packed `Shown`: where bridges may write the open update's tensors."""
        with self._turn(deadline):
            if self._updating is None:
                raise RequestError(HTTPStatus.CONFLICT, "no update is open: begin first")
            with self._part_of_update():
                return [reply.data for reply in self._expect(self._call(Places(tuple(known)), deadline))]

    def finish(self, version: int, *, deadline: float) -> None:
        """End the open update, whose pieces must all have been loaded, and drop all caches.

        The engine holds `version` now, but counts as torn until `resume` confirms it. So if the daemon ends before it
        has verified the engine, the engine does not pass for whole.
        """
        with self._turn(deadline):
            if self._updating != version:
                message = "no update is open" if self._updating is None else f"the open update is to {self._updating}"
                raise RequestError(HTTPStatus.CONFLICT, message)
            self._expect(self._call(Finish(deadline), deadline))
            self.version = version
            self.blank = False
            self._updating = None
            self._finished = True
            self._flushes += 1

    def residents(self, digest: bytes, *, deadline: float) -> list[bytes]:
        """Return each rank's packed `ResidentBoxes`: the boxes of an accepted manifest's tensors that it holds."""
        with self._turn(deadline):
            return [reply.data for reply in self._expect(self._call(Residents(digest), deadline))]

    def fingerprints(self, digest: bytes, *, deadline: float) -> list[bytes]:
        """Return each rank's fingerprints of these boxes in its parameters, 8 bytes each, little-endian."""
        with self._turn(deadline):
            return [reply.data for reply in self._expect(self._call(Fingerprints(digest), deadline))]

    def checksums(self, *, deadline: float) -> list[str]:
        """Return each rank's xxh3 over its parameters in order, as hex."""
        with self._turn(deadline):
            return [reply.data.hex() for reply in self._expect(self._call(Checksums(), deadline))]

    def break_update(self, reason: str, *, deadline: float) -> None:
        """Behave as if a worker had failed inside a command. For injected faults."""
        with self._turn(deadline), self._part_of_update():
            raise RequestError(HTTPStatus.INTERNAL_SERVER_ERROR, reason)

    @contextmanager
    def _part_of_update(self) -> Iterator[None]:
        """Wrap a step: a worker's failure ends the update unfinished; a command out of order (409) changes nothing."""
        self._touched = monotonic()
        try:
            yield
        except RequestError as error:
            if error.status != HTTPStatus.CONFLICT:
                self._updating = None
                self._close_gate("the update failed")
            raise

    def _required(self) -> frozenset[str]:
        """Return the names that the next update must bring for the engine to be whole."""
        return self._known if self.blank else self._dirty

    # -- pausing ---------------------------------------------------------------------------------------------------

    def pause(self, mode: PauseMode, *, deadline: float) -> None:
        """Stop generation as `mode` says; on return no decode step is under way. Pausing a paused engine succeeds."""
        if mode == "none":
            return
        with self._turn(deadline):
            self._gate.close(mode)
        self._gate.settle(deadline=deadline)

    def resume(self, *, deadline: float) -> None:
        """Serve again, and confirm a finished update. Resuming a serving engine succeeds.

        Raises `RequestError` if an update is unfinished.
        """
        with self._turn(deadline):
            if self.torn and not self._finished:
                raise RequestError(HTTPStatus.CONFLICT, "the engine is torn: only a whole update mends it", torn=True)
            self._dirty = frozenset()
            self._finished = False
            self._gate.open()

    def _close_gate(self, why: str) -> None:
        """Stop serving because of an update; requests in flight wait for its repair."""
        if self._gate.shut():
            logger.warning("[engine=%s] %s while serving: pausing", self.name, why)

    # -- generation ------------------------------------------------------------------------------------------------

    def generate(
        self, prompt: Sequence[int], max_tokens: int, *, deadline: float, seed: int | None = None
    ) -> Generated:
        """Continue `prompt` by at most `max_tokens` tokens: greedily, or, with a `seed`, sampled at temperature 1.

        The same seed draws the same tokens.
        """
        self._check_prompt(prompt, max_tokens)
        if self.blank:
            raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, "the engine holds no weights yet")
        entered = self._gate.enter()
        sequence = next(self._sequences)
        try:
            return self._generate(sequence, list(prompt), max_tokens, entered, deadline, seed)
        finally:
            self._ended.append(sequence)
            self._gate.leave()

    def _generate(
        self, sequence: int, tokens: list[int], max_tokens: int, entered: int, deadline: float, seed: int | None
    ) -> Generated:
        prompt = len(tokens)
        logprobs: list[float] = []
        draws = None if seed is None else random.Random(seed)
        version, flushes, cached = self.version, self._flushes, 0
        while len(logprobs) < max_tokens:
            with self._turn(deadline):
                if self._gate.aborted(entered):
                    return Generated(tokens[prompt:], logprobs, "abort", version)
                if self.torn and monotonic() - self._touched > _STALLED_SECONDS:
                    self._close_gate("the update stalled")
                chosen = None
                if not self.paused:
                    if self._flushes != flushes:
                        flushes, cached = self._flushes, 0
                    version = self.version
                    draw = None if draws is None else draws.random()
                    chosen = self._step(sequence, cached, tokens[cached:], draw)
            if chosen is None:
                self._gate.wait_open(entered, deadline=deadline)
                continue
            cached = len(tokens)
            tokens.append(chosen.token)
            logprobs.append(chosen.logprob)
            if chosen.token in self.config.eos_token_id:
                return Generated(tokens[prompt:], logprobs, "stop", version)
        return Generated(tokens[prompt:], logprobs, "length", version)

    def _step(self, sequence: int, start: int, tokens: list[int], draw: float | None) -> Reply:
        ended = tuple(self._ended.popleft() for _ in range(len(self._ended)))
        return self._call(Step(sequence, start, tuple(tokens), ended, draw), monotonic())[0]

    def _check_prompt(self, prompt: Sequence[int], max_tokens: int) -> None:
        if not prompt or not 0 <= min(prompt) <= max(prompt) < self.config.vocab_size:
            raise RequestError(HTTPStatus.BAD_REQUEST, f"prompt_ids: one or more of 0 to {self.config.vocab_size - 1}")
        longest = self.config.max_position_embeddings
        if max_tokens < 1 or len(prompt) + max_tokens > longest:
            raise RequestError(
                HTTPStatus.BAD_REQUEST, f"max_tokens: at least 1, and with the {len(prompt)} of the prompt {longest}"
            )

    # -- workers ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _turn(self, deadline: float) -> Iterator[None]:
        """Hold the turn at the workers. If a worker is lost inside, the engine ends."""
        try:
            with self._turns.take(deadline=deadline):
                yield
        except TimeoutError as error:
            raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from error
        except EngineLost as error:
            logger.error("[engine=%s] %s", self.name, error)  # noqa: TRY400 - the sentence says it all
            self._on_lost()
            raise RequestError(HTTPStatus.INTERNAL_SERVER_ERROR, str(error)) from error

    def _call(self, command: Command, deadline: float) -> list[Reply]:
        return self._workers.call(command, deadline=max(deadline, monotonic()) + _LOST_SECONDS)

    def _call_each(self, command: Callable[[int], Command], deadline: float) -> list[Reply]:
        return self._workers.call_each(command, deadline=max(deadline, monotonic()) + _LOST_SECONDS)

    def _expect(self, replies: list[Reply]) -> list[Reply]:
        """Return the replies if all are successes. Otherwise raise the worst one as `RequestError`."""
        worst = max(replies, key=lambda reply: reply.status)
        if worst.status != HTTPStatus.OK:
            rank = replies.index(worst)
            raise RequestError(HTTPStatus(worst.status), f"tp_rank {rank}: {worst.error}", tp_rank=rank)
        return replies
