"""`python -m weightsync.keeper`: started by weightsyncd, one for each model; of no use by hand."""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import time

import msgspec
import torch

from weightsync import logs
from weightsync.errors import LocalProtocolError, PushAborted, TransportBroken, WeightSyncError
from weightsync.keeper import commands as c
from weightsync.keeper.store import Store
from weightsync.trainer.place import trainer_place
from weightsync.trainer.rank import RankPush
from weightsync.wire.pipe import Pipe

logger = logging.getLogger("weightsync.keeper")

_ANSWER_SECONDS = 30.0  # to send an answer; a daemon that does not read for so long is stuck


def main(argv: list[str] | None = None) -> None:
    """Serve until the daemon closes its end of the pipe."""
    parser = argparse.ArgumentParser(prog="python -m weightsync.keeper", description=__doc__)
    parser.add_argument("--pipe", type=int, required=True, help="this end of the socket pair to the daemon")
    parser.add_argument("--daemon", required=True, help="the endpoint that trainers of its node call")
    parser.add_argument("--model", required=True)
    parser.add_argument("--gpu", action="store_true", help="slots lie on GPUs: read them by the one that is visible")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    parser.add_argument("--log-format", default="human", choices=("human", "json"))
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the daemon decides when a keeper ends
    logs.set_up(arguments.log_level, arguments.log_format, model=arguments.model)
    torch.set_num_threads(1)
    keeper = _Keeper(arguments.model, arguments.daemon, gpu=0 if arguments.gpu else None)
    pipe, decoder = Pipe(socket.socket(fileno=arguments.pipe)), msgspec.msgpack.Decoder(c.Command)
    try:
        keeper.warm()
        while True:
            reply = keeper.answer(decoder.decode(pipe.receive(deadline=None)))
            pipe.send(msgspec.msgpack.encode(reply), deadline=time.monotonic() + _ANSWER_SECONDS)
            if reply.error is not None and (why := _gpu_lost()):
                logger.error("the GPU failed, and with it what is kept cannot be pushed again: %s", why)
                return
    except TransportBroken:
        logger.info("pipe.complete: the daemon is gone")


def _on_gpu() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _gpu_lost() -> str:
    """Return the error that has ended this process's CUDA context, or "". Only a new process gets a new context."""
    if _on_gpu():
        try:
            torch.cuda.current_stream().query()  # does not wait: a GPU that is merely busy is not lost
        except RuntimeError as error:
            return str(error)
    return ""


class _Keeper:
    def __init__(self, model: str, endpoint: str, *, gpu: int | None) -> None:
        self._model = model
        self._endpoint = endpoint
        self._store = Store(gpu)

    def warm(self) -> None:
        """Get the GPU ready before the first push, since that takes time. A failure shows again in that push."""
        try:
            self._store.warm()
        except (WeightSyncError, RuntimeError) as error:
            logger.warning("the keeper's GPU is not ready: %s", error)

    def answer(self, command: c.Command) -> c.Reply:
        """Do one command. An error becomes the answer."""
        try:
            self._do(command)
        except WeightSyncError as error:
            return self._reply(error)
        except Exception as error:  # last resort: a bug's error, too, must reach the daemon, which waits for an answer
            logger.exception("%s.failed", type(command).__name__.lower())
            return self._reply(LocalProtocolError(f"the keeper failed: {type(error).__name__}: {error}"))
        return self._reply()

    def _reply(self, error: WeightSyncError | None = None) -> c.Reply:
        kept = self._store.kept
        record = error.record() if error is not None else None
        if kept is None or not kept.whole:
            return c.Reply(error=record)
        return c.Reply(kept.version, kept.nbytes, record)

    def _do(self, command: c.Command) -> None:
        match command:
            case c.Hello():
                pass
            case c.Begin(version, after, manifest, offers, deadline):
                self._store.begin(version, after, manifest, offers, deadline=deadline)
            case c.Load(bucket, ticket, deadline):
                self._store.load(bucket, ticket, deadline=deadline)
            case c.Finish():
                self._store.finish()
            case c.Commit():
                self._store.commit()
            case c.Settle(whole):
                self._store.settle(whole=whole)
            case c.Repeat(engines, deadline):
                self._repeat(engines, deadline)

    def _repeat(self, engines: tuple[str, ...], deadline: float) -> None:
        kept = self._store.kept
        if kept is None or not kept.whole:
            raise LocalProtocolError("nothing whole is kept")
        push = RankPush(
            kept.source(),
            place=trainer_place(),
            version=kept.version,
            model=self._model,
            endpoint=self._endpoint,
            pause="keep",
            started=time.monotonic(),
            deadline=deadline,
            engines=engines,
        )
        try:
            report = push.run()
        finally:
            if _on_gpu():
                torch.cuda.empty_cache()  # weights passed through this GPU on their way into slots
        failed = [
            f"{engine.engine}: {engine.error.message if engine.error is not None else engine.outcome}"
            for engine in report.engines
            if engine.outcome != "committed"
        ]
        if failed:
            raise PushAborted("; ".join(failed), model=self._model, version=kept.version)


if __name__ == "__main__":
    main()
