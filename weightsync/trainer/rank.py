"""One trainer rank in one push: describes its weights, fills the slots that it has leases for, hears the outcome.

The rank talks to its daemon and writes into mapped arenas. It talks to no other rank. Its program says what it writes
where. The program is made once for a plan and kept, so that later pushes of the same layout only copy.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from weightsync.errors import (
    CodecError,
    DaemonLost,
    PushAborted,
    PushTimeout,
    RemoteProtocolError,
    WeightSyncError,
)
from weightsync.filling.program import compile_program
from weightsync.plan.manifest import Manifest
from weightsync.processes import started
from weightsync.report import PushReport
from weightsync.trainer.rank_exposing import RankExposing
from weightsync.trainer.rank_filling import RankFilling
from weightsync.trainer.rank_memory import memory
from weightsync.wire import messages as msg

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightsync.errors import ErrorRecord
    from weightsync.filling.local import LocalWeights
    from weightsync.sources.base import Source
    from weightsync.trainer.place import TrainerPlace
    from weightsync.wire.trainer_link import TrainerLink

__all__ = ["RankPush"]

logger = logging.getLogger(__name__)

_GLANCE = 50e-6  # seconds between two looks at work under way
_PATIENCE = 10.0  # seconds beyond the deadline for a GPU to finish its queued work


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
        in_place: bool = False,
        partial: bool = False,
        engines: tuple[str, ...] = (),
    ) -> None:
        """Describe the source. `in_place`: engines may read it where it lies. `partial`: the source lacks tensors of
        the model. `engines`: this push repeats an earlier one, for these engines alone. Raises `SourceError`.
        """
        self.on_progress: Callable[[int, int], None] | None = None  # see `push_source`
        self.version = version
        self.deadline = deadline
        self.filled = threading.Event()  # set once this rank's weights have been read
        self._source, self._place, self._model, self._endpoint = source, place, model, endpoint
        self._pause = pause
        self._in_place, self._partial, self._engines = in_place, partial, engines
        self._layout = source.layout()
        self._flaw = _measured(source)  # why this rank cannot push; all ranks hear it before an engine is touched
        self._describe_seconds = time.monotonic() - started
        self._number = secrets.randbits(48)  # id in messages: late ones about an earlier push have another
        self._filling: RankFilling | None = None
        self._exposing: RankExposing | None = None
        self._local = _on_gpus(source) if self._flaw is None else None
        self._ready = self._local.ready() if self._local is not None else []
        self._device = _current_gpu()
        self._thread = threading.get_ident()
        self._welcome = False  # the daemon has accepted `Open`
        self._busy_seconds = self._describe_seconds
        self._exposed_since = 0.0

    def run(self) -> PushReport:
        """Take part in the push until it ends."""
        if self._device is not None and threading.get_ident() != self._thread:
            sys.modules["torch"].cuda.set_device(self._device)  # a new thread starts on GPU 0, on every rank
        with memory().push():
            return self._run()

    def _run(self) -> PushReport:
        link = memory().take_link(self._endpoint)
        try:
            link.start()
            self._open(link)
            try:
                outcome = self._converse(link)
            finally:
                self._stop_work()
        except DaemonLost:
            link.close(flush=0.0)
            if self._flaw is not None:
                raise self._flaw from None
            raise
        except _Told as told:
            memory().give_link(link)
            raise told.error from None
        except BaseException as error:
            record = self._own_failure(error)
            link.send(msg.Failed(id=self._number, error=record))
            if not isinstance(error, Exception):  # Ctrl-C: the user does not wait for the daemon's answer
                memory().give_link(link)
                raise
            try:
                heard = None if isinstance(error, PushTimeout) else self._hear_the_end(link)
            except DaemonLost as lost:  # its arenas ended with it, and that may have caused `error`
                link.close(flush=0.0)
                raise lost from error
            memory().give_link(link)
            if heard is None and isinstance(error, WeightSyncError):
                raise
            raise heard or record.error() from error
        memory().give_link(link)
        return PushReport.of(outcome, self._busy_seconds)

    def _open(self, link: TrainerLink) -> None:
        place, digest = self._place, self._layout.digest
        # A random digest makes the daemon ask for the layout, which it does once all ranks have called. This rank fails
        # then: so all ranks hear of the failure in this push, and no rank after it has called for the next.
        if self._flaw is not None:
            digest = secrets.token_bytes(len(digest))
        plan = memory().plans.get((self._endpoint, digest))
        if plan is not None and plan + digest not in memory().programs:
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
                in_place=self._in_place,
                partial=self._partial,
                engines=self._engines,
                pid=os.getpid(),
                started=started(os.getpid()),
            )
        )

    def _converse(self, link: TrainerLink) -> msg.PushOutcome:
        # the daemon enforces the deadline and names what was missing, so this side waits a little longer for its answer
        until = self.deadline + link.patience
        while True:
            if self._at_work():
                message = link.receive(min(until, time.monotonic() + _GLANCE))
                if message is None and time.monotonic() < until:
                    continue
            else:
                message = link.receive(until)
            if message is not None and message.id not in self._numbers(message):
                continue  # a late message about an earlier push
            match message:
                case None:
                    raise PushTimeout("the daemon did not end the push in time", version=self.version)
                case msg.Welcome():
                    self._welcome = True
                    link.set_heartbeat(message.heartbeat)
                case msg.AskDescription():
                    if self._flaw is not None:
                        raise self._flaw
                    link.send(msg.Describe(id=self._number, layout=self._layout.pack()))
                case msg.Planned():
                    self._prepare(message, link)
                case msg.Lease() if self._filling is not None:
                    self._filling.begin(message)
                case msg.AskExposure() if self._exposing is not None:
                    self._exposing.tell_all()
                case msg.Drawn() if self._filling is not None:
                    self._busy_seconds = self._describe_seconds + time.monotonic() - self._exposed_since
                    self._filling.seconds = 0.0  # already counted in the line above
                    self.filled.set()
                case msg.Ended():
                    self._stop_work()
                    link.send(msg.Stopped(id=self._number))
                    if message.outcome is not None:
                        return message.outcome
                    if message.error is not None:
                        raise _Told(message.error.error())
                    raise RemoteProtocolError("the push ended with neither an outcome nor an error")
                case msg.ErrorReply():  # the daemon refused a frame of ours; if that was `Open`, it says nothing more
                    raise message.error.error() if self._welcome else _Told(message.error.error())
                case _:
                    raise RemoteProtocolError(f"a trainer rank does not take {type(message).__name__}")

    def _numbers(self, message: msg.Message) -> tuple[int, ...]:
        """Return the ids that mark `message` as this push's. A reply to a frame that could not be read has id 0."""
        return (self._number, 0) if isinstance(message, msg.ErrorReply) else (self._number,)

    def _hear_the_end(self, link: TrainerLink) -> WeightSyncError | None:
        """After a failure of this rank, wait for the error that every rank gets: it names the engines left torn.

        Returns None if the daemon sends none in time. Raises `DaemonLost`.
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
        """Return this rank's failure as the other ranks hear it."""
        if isinstance(error, WeightSyncError):
            record = error.record()
            return record if record.rank is not None else msgspec.structs.replace(record, rank=self._place.rank)
        reason = "was interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {error!r}"
        return PushAborted(f"rank {self._place.rank} {reason}", rank=self._place.rank).record()

    # --- its part of the work ---------------------------------------------------------------------------------------

    def _prepare(self, message: msg.Planned, link: TrainerLink) -> None:
        digest = self._layout.digest
        key = message.plan + digest
        program = memory().programs.get(key)
        if program is None:
            if message.manifest is None or message.fills is None:
                raise RemoteProtocolError("the daemon left out a plan that this rank does not have")
            fills = np.frombuffer(message.fills, dtype="<i4")
            program = compile_program(message.plan, Manifest.unpack(message.manifest), self._layout, fills)
            memory().keep_program(key, program)
        memory().plans[self._endpoint, digest] = message.plan

        def tell(words: msg.Message) -> None:
            link.send(msgspec.structs.replace(words, id=self._number))

        progress = self.on_progress
        self._filling = RankFilling(
            self._source,
            program,
            key,
            message.offers,
            local=self._local,
            ready=self._ready,
            deadline=self.deadline,
            tell=tell,
            on_progress=None if progress is None else lambda written: progress(written, program.nbytes),
        )
        if not self._filling.left:
            self.filled.set()
        if not message.expose:
            memory().forget_exposed(key)
            return
        self._exposed_since = time.monotonic()
        self._exposing = RankExposing(
            self._source,
            program,
            key,
            local=self._local,
            ready=self._ready,
            on_gpus=self._filling.on_gpus,
            endpoint=self._endpoint,
            tell=tell,
        )

    def _at_work(self) -> bool:
        """Advance the work, and tell the daemon of it. Returns whether work is left that waits for no message."""
        work = [one for one in (self._exposing, self._filling) if one is not None and one.busy]
        for one in work:
            one.advance()
        if work:
            self._note_filled()
        return any(one.busy for one in work)

    def _stop_work(self) -> None:
        """Wait for the work under way; afterwards nothing of this push writes into slots or reads weights."""
        exposing, self._exposing = self._exposing, None
        filling, self._filling = self._filling, None
        try:
            if filling is not None:
                self._busy_seconds += filling.seconds
                filling.close(deadline=self.deadline + _PATIENCE)
        finally:
            if exposing is not None:
                exposing.close(deadline=self.deadline + _PATIENCE)

    def _note_filled(self) -> None:
        """Set `filled` if nothing here reads weights any more: buckets are written, exposed weights are measured."""
        if (self._filling is None or not self._filling.left) and (self._exposing is None or not self._exposing.busy):
            self.filled.set()


def _measured(source: Source) -> Exception | None:
    """Have the source look at the values that it will send, if it has a `measure`. Returns the error if that fails."""
    measure = getattr(source, "measure", None)
    if measure is None:
        return None
    try:
        measure()
    except Exception as error:  # noqa: BLE001 - raised once the daemon asks: other ranks would wait for this one
        return error
    return None


def _on_gpus(source: Source) -> LocalWeights | None:
    """Return where the weights lie, or None if this process uses no GPU. Does not import torch."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    from weightsync.filling.local import LocalWeights

    return LocalWeights(source)


def _current_gpu() -> int | None:
    """Return the calling thread's GPU, or None if this process uses none."""
    torch: Any = sys.modules.get("torch")
    return torch.cuda.current_device() if torch is not None and torch.cuda.is_initialized() else None
