"""One tensor-parallel rank: a process that owns parameters and runs the front's commands in the order they come.

A failed collective ends the process, and with it the engine, because ranks cannot get back into step. Any other failure
of a command is answered, and the engine decides. The process never outlives the front.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import socket
import sys
from time import monotonic
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
import xxhash

from weightsync.adapters.reference.checkpoint import open_checkpoint
from weightsync.adapters.reference.commands import (
    Accept,
    Begin,
    Checksums,
    Command,
    Draw,
    Fingerprints,
    Finish,
    Load,
    Places,
    Reply,
    Residents,
    Step,
)
from weightsync.adapters.reference.config import read_config
from weightsync.adapters.reference.host import HostParameters
from weightsync.adapters.reference.parallel import ParallelDecoder, Ranks, place_of
from weightsync.adapters.reference.plugin import BucketLoader
from weightsync.errors import ConfigError, LocalProtocolError, TransportBroken, WeightSyncError
from weightsync.plan.manifest import Manifest
from weightsync.plan.told import SeenExposures
from weightsync.transports import receiver
from weightsync.wire.pipe import Pipe

if TYPE_CHECKING:
    from typing import Any

    from weightsync.adapters.reference.config import ModelConfig

__all__ = ["Worker", "main"]

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 30.0  # the front always reads; if it does not for this long, it is stuck
_PR_SET_PDEATHSIG = 1


class Worker:
    """A rank's decoder and its reading side, driven by commands."""

    def __init__(self, config: ModelConfig, ranks: Ranks, *, gpu: int | None = None, trial: str = "") -> None:
        """`gpu` is the CUDA device number of the GPU for the parameters, which must be torch's default device.

        None: host memory. `trial`, for tests, is a `Trial` as JSON.
        """
        self.decoder = ParallelDecoder(config, ranks)
        params = self.decoder.params
        self.exposures = SeenExposures()
        if gpu is None:
            arrays = {name: _integers(tensor) for name, tensor in params.items()}
            self.loader = BucketLoader(config, self.decoder.layout, HostParameters(arrays), receiver("shm"))
            return
        from weightsync.adapters.reference.device import DeviceParameters, Trial

        order = msgspec.json.decode(trial, type=Trial) if trial else None
        memory = DeviceParameters(params, order)
        self.loader = BucketLoader(config, self.decoder.layout, memory, receiver("cuda-ipc", device=gpu), gpu=gpu)

    def load_checkpoint(self, directory: str) -> None:
        """Fill the parameters from disk. Reads only this rank's boxes, and converts values if dtypes differ."""
        params = self.decoder.params
        with open_checkpoint(directory, self.decoder.config) as checkpoint:
            for boxes in self.decoder.layout.slices.values():
                for box in boxes:
                    place_of(box, params).copy_(checkpoint.read_box(box.tensor, box.offset, box.shape))

    def answer(self, command: Command) -> Reply:
        """Run one command. Only a decode step may raise."""
        if isinstance(command, Step):
            self.decoder.drop(command.ended)
            choice = self.decoder.step(command.sequence, command.start, list(command.tokens), command.draw)
            return Reply(token=choice.token, logprob=choice.logprob)
        try:
            return self._answer(command)
        except LocalProtocolError as error:
            return Reply(status=409, error=str(error))
        except WeightSyncError as error:
            return Reply(status=500, error=str(error))
        except Exception as error:  # the seam: no collective was under way, so the rank is still in step
            logger.exception("[rank=%d] %s.failed", self.decoder.ranks.tp_rank, type(command).__name__)
            return Reply(status=500, error=f"{type(error).__name__}: {error}")

    def _answer(self, command: Command) -> Reply:
        match command:
            case Accept(manifest):
                self.loader.accept(Manifest.unpack(manifest))
            case Begin(digest, offers, deadline):
                self.loader.begin(digest, offers, deadline=deadline)
            case Draw(exposures, deadline):
                return Reply(data=self.loader.draw(self.exposures.of(exposures), deadline=deadline).encode())
            case Places(known):
                return Reply(data=self.loader.places(known).pack())
            case Load(bucket, ticket, deadline):
                self.loader.load(bucket, ticket, deadline=deadline)
            case Finish(deadline):
                self.loader.finish(deadline=deadline)
                self.decoder.flush()
            case Residents(digest):
                return Reply(data=self.loader.residents(digest).pack())
            case Fingerprints(digest):
                return Reply(data=self.loader.fingerprints(digest).astype("<u8").tobytes())
            case Checksums():
                return Reply(data=self._checksum())
        return Reply()

    def _checksum(self) -> bytes:
        hasher = xxhash.xxh3_64()
        for tensor in self.decoder.params.values():
            hasher.update(_integers(tensor.cpu()).reshape(-1).view(np.uint8).data)
        return hasher.digest()


def _integers(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """View the tensor's memory as unsigned integers of its element size, since numpy has no bfloat16."""
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    array: np.ndarray[Any, Any] = tensor.view(signed).numpy()
    return array.view(f"u{tensor.element_size()}")


def main(argv: list[str] | None = None) -> None:
    """Run a worker, and do not return. Only the front starts workers; `group.py` has the arguments."""
    parser = argparse.ArgumentParser(prog="weightsync reference engine worker")
    parser.add_argument("--pipe", type=int, required=True)
    parser.add_argument("--store", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--tp", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--load-format", choices=("auto", "dummy"), required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--trial", default="")
    parser.add_argument("--collective-timeout", type=float, required=True)
    parser.add_argument("--log-level", required=True)
    arguments = parser.parse_args(argv)
    _end_with(arguments.parent)
    logging.basicConfig(level=arguments.log_level, format=f"%(asctime)s %(name)s tp_rank={arguments.rank} %(message)s")
    torch.set_num_threads(1)
    pipe = Pipe(socket.socket(fileno=arguments.pipe))
    try:
        ranks = Ranks(
            f"/proc/self/fd/{arguments.store}", arguments.tp, arguments.rank, timeout=arguments.collective_timeout
        )
        gpu = _take_gpu(arguments.rank) if arguments.device == "cuda" else None
        worker = Worker(read_config(arguments.model), ranks, gpu=gpu, trial=arguments.trial)
        if arguments.load_format == "auto":
            worker.load_checkpoint(arguments.model)
    except (WeightSyncError, RuntimeError, OSError) as error:
        _reply(pipe, Reply(status=500, error=str(error)))
        _leave(1)
    _reply(pipe, Reply())
    try:
        _serve(pipe, worker)
    except TransportBroken:
        worker.loader.close()
        _leave(0)  # the front closed its end
    except Exception:
        logger.exception("[rank=%d] worker.failed", arguments.rank)
        _leave(1)


def _serve(pipe: Pipe, worker: Worker) -> None:
    decoder = msgspec.msgpack.Decoder(Command)
    while True:
        _reply(pipe, worker.answer(decoder.decode(pipe.receive(deadline=None))))


def _reply(pipe: Pipe, reply: Reply) -> None:
    pipe.send(msgspec.msgpack.encode(reply), deadline=monotonic() + _ANSWER_SECONDS)


def _take_gpu(rank: int) -> int:
    """Choose this rank's GPU, in turn from those that the engine sees, and make it torch's default device."""
    if not torch.cuda.is_available():
        raise ConfigError(f"--device cuda: torch {torch.__version__} sees no GPU")
    gpu = rank % torch.cuda.device_count()
    torch.cuda.set_device(gpu)
    torch.set_default_device(torch.device("cuda", gpu))
    return gpu


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when the front dies, even inside a long computation."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the front died before prctl
        _leave(1)


def _leave(status: int) -> None:
    """End without interpreter shutdown: gloo's threads abort the process if their group is destroyed late."""
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
