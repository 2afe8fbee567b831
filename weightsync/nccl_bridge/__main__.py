"""`python -m weightsync.nccl_bridge`: started by weightsyncd, one for each GPU; of no use by hand."""

from __future__ import annotations

import argparse
import os
import signal

from weightsync import logs
from weightsync.ipc.arena import MAX_READERS
from weightsync.ipc.segments import DIRECTORY
from weightsync.nccl_bridge.process import BridgeProcess, Options


def main() -> None:
    """Read the command line, leave signals to the daemon, serve."""
    parser = argparse.ArgumentParser(prog="python -m weightsync.nccl_bridge", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="this end of the pipe to the daemon")
    parser.add_argument("--node", required=True)
    parser.add_argument("--index", type=int, required=True)
    parser.add_argument("--incarnation", required=True, help="16 hexadecimal digits, part of the arena's name")
    parser.add_argument("--shm-dir", default=DIRECTORY)
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--slot-bytes", type=int, required=True)
    parser.add_argument("--readers", type=int, default=MAX_READERS)
    parser.add_argument("--gpu", default="", help="UUID of the one GPU that this process sees: slots lie there")
    parser.add_argument("--daemon", default="", help="PID:START of the daemon, by which orphans are told from others")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    parser.add_argument("--log-format", default="human", choices=("human", "json"))
    arguments = parser.parse_args()

    # The daemon decides when a bridge ends: a Ctrl-C or SIGTERM to the whole process group must not end it first. If
    # the daemon dies, its end of the pipe closes, which ends this process.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    logs.set_up(arguments.log_level, arguments.log_format, bridge=f"{arguments.node}/{arguments.index}")
    # torch reads this when it is loaded: its C++ log would repeat, with a stack trace, every error that we report
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    BridgeProcess(
        Options(
            fd=arguments.fd,
            node=arguments.node,
            index=arguments.index,
            incarnation=arguments.incarnation,
            directory=arguments.shm_dir,
            slots=arguments.slots,
            slot_bytes=arguments.slot_bytes,
            readers=arguments.readers,
            gpu=arguments.gpu,
        )
    ).run()


if __name__ == "__main__":
    main()
