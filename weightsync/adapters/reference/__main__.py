"""python -m weightsync.adapters.reference: start the workers, serve, and end as one.

Exit status: 0 after SIGTERM or SIGINT, 1 when a worker died (a half-alive engine is worse than none), 2 when the engine
cannot start. WEIGHTSYNC_REFERENCE_API_KEY, if set, is the bearer key every request must carry.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import sys
import threading
from pathlib import Path
from time import monotonic

from weightsync.adapters.reference.config import read_config
from weightsync.adapters.reference.engine import Engine
from weightsync.adapters.reference.faults import Faults
from weightsync.adapters.reference.group import WorkerGroup
from weightsync.adapters.reference.server import EngineServer
from weightsync.adapters.reference.sharding import check_tp
from weightsync.errors import WeightSyncError

__all__ = ["main"]

logger = logging.getLogger("weightsync.adapters.reference")


def main(argv: list[str] | None = None) -> int:
    """Run an engine until it is told to stop or loses a worker. Returns the exit status."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=arguments.log_level, format="%(asctime)s %(name)s %(message)s")
    wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    stopped = threading.Event()

    def stop(_signal: int, _frame: object) -> None:
        stopped.set()
        os.eventfd_write(wake, 1)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        config = read_config(arguments.model)
        check_tp(config, arguments.tp)
        workers = WorkerGroup(
            arguments.model,
            arguments.tp,
            load_format=arguments.load_format,
            device=arguments.device,
            trial=arguments.trial,
            log_level=arguments.log_level,
        )
    except (WeightSyncError, OSError) as error:
        logger.critical("cannot start: %s", error)
        return 2
    try:
        if not workers.wait_ready(deadline=monotonic() + arguments.start_timeout, unless=wake):
            workers.end(kill=True)
            return 0
        engine = Engine(
            config,
            workers,
            name=arguments.name,
            blank=arguments.load_format == "dummy",
            on_lost=lambda: os.eventfd_write(wake, 1),
        )
        server = EngineServer(
            (arguments.host, arguments.port),
            engine,
            api_key=os.environ.get("WEIGHTSYNC_REFERENCE_API_KEY") or None,
            faults=Faults() if arguments.enable_faults else None,
        )
    except (WeightSyncError, OSError, OverflowError) as error:
        workers.end(kill=True)
        logger.critical("cannot start: %s", error)
        return 2
    serving = threading.Thread(target=server.serve_forever, name="http", daemon=True)
    serving.start()
    port = server.server_address[1]
    if arguments.port_file is not None:
        _write_whole(arguments.port_file, f"{port}\n")
    logger.info("[engine=%s] serving on http://%s:%d", engine.name, arguments.host, port)
    _wait(wake, workers)
    server.socket.close()  # take no new connections; the threads of open ones end with the process
    workers.end(kill=not stopped.is_set())
    if stopped.is_set():
        return 0
    logger.critical("[engine=%s] a worker died; ending the engine", engine.name)
    return 1


def _wait(wake: int, workers: WorkerGroup) -> None:
    """Return when `wake` was written to, or a worker ended. Has no deadline: the process lives until then."""
    poll = select.poll()
    poll.register(wake, select.POLLIN)
    for process in workers.processes:
        poll.register(os.pidfd_open(process.pid), select.POLLIN)
    poll.poll()


def _write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader finds all of the text, or no file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m weightsync.adapters.reference",
        description="A small Qwen3-style inference engine that takes weights from weightsync.",
    )
    parser.add_argument("--model", required=True, help="Hugging Face checkpoint directory (Qwen3 or Qwen3-MoE)")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks, each a process (default 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: one GPU a rank, in turn")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default 0: any free one)")
    parser.add_argument("--port-file", type=Path, help="where to write the port once the engine is ready")
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto", help="dummy: start without weights")
    parser.add_argument("--name", default="reference", help="what logs and /info call it")
    parser.add_argument("--enable-faults", action="store_true", help="for tests: serve POST /faults")
    parser.add_argument("--trial", default="", help='for tests: how ranks on GPUs misbehave, {"slow": 0.01, …}')
    parser.add_argument("--start-timeout", type=float, default=300.0, help="seconds for the workers to be ready")
    parser.add_argument("--log-level", default="WARNING", type=str.upper, help="such as INFO (default WARNING)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
