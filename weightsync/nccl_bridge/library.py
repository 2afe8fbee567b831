"""NCCL's C interface, as much of it as a bridge needs, and without waiting.

The library is the one that cupy brings or finds, and torch uses too. Its calls are made through ctypes, because cupy's
own wrapper raises on ncclInProgress, the answer on which everything here rests: a communicator that never blocks can be
watched, given up at a deadline and aborted, also while it is being set up.

Source: nccl.h of 2.28 and the "Fault Tolerance" chapter of NVIDIA's user guide. The layout of the configuration is that
of 2.18, which later versions read by its own size and version.
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING, Any

from weightsync.errors import ConfigError, TransportBroken

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["UNIQUE_ID_BYTES", "Nccl", "settings_here"]

UNIQUE_ID_BYTES = 128
_SUCCESS, _IN_PROGRESS = 0, 7
_BYTE, _FLOAT, _SUM = 1, 7, 0  # ncclUint8, ncclFloat32, ncclSum
_UNDEFINED = -(2**31)
_MUST_MATCH = ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE")


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_char * UNIQUE_ID_BYTES),)


class _Config(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
        ("split_share", ctypes.c_int),
    )


class Nccl:
    """The library in this process. Every call returns at once, or raises `TransportBroken` with what NCCL says."""

    def __init__(self) -> None:
        """Raises `ConfigError` where there is none."""
        try:
            from cupy.cuda import nccl  # loads it, from where this cupy has it

            self._library: Any = ctypes.CDLL("libnccl.so.2")  # … which this now finds loaded
        except (ImportError, OSError) as error:
            raise ConfigError(
                f"nodes whose slots lie on GPUs are joined by NCCL, which cannot be loaded here: {error}",
                hint='pip install nvidia-nccl-cu13 (or -cu12), which torch brings too; or arena.device = "cpu"',
            ) from error
        number = int(nccl.get_version())
        self.version = f"{number // 10000}.{number // 100 % 100}.{number % 100}"
        self._library.ncclGetErrorString.restype = ctypes.c_char_p
        self._library.ncclGetLastError.restype = ctypes.c_char_p

    def unique_id(self) -> bytes:
        """A new one. From now on this process listens for those who are told it."""
        made = _UniqueId()
        self._check("ncclGetUniqueId", self._library.ncclGetUniqueId(ctypes.byref(made)))
        return bytes(made)

    def begin(self, world: int, unique_id: bytes, rank: int) -> ctypes.c_void_p:
        """A communicator on the current GPU, which is `ready` once all have begun it."""
        communicator = ctypes.c_void_p()
        config = _Config(
            size=ctypes.sizeof(_Config),
            magic=0xCAFEBEEF,
            version=21800,
            blocking=0,
            cga_cluster_size=_UNDEFINED,
            min_ctas=_UNDEFINED,
            max_ctas=_UNDEFINED,
            net_name=None,
            split_share=_UNDEFINED,
        )
        identity = _UniqueId.from_buffer_copy(unique_id)
        status = self._library.ncclCommInitRankConfig(
            ctypes.byref(communicator), ctypes.c_int(world), identity, ctypes.c_int(rank), ctypes.byref(config)
        )
        self._check("ncclCommInitRankConfig", status)
        return communicator

    def ready(self, communicator: ctypes.c_void_p) -> bool:
        """Whether nothing that was asked of it is still in progress on the host."""
        state = ctypes.c_int()
        self._check("ncclCommGetAsyncError", self._library.ncclCommGetAsyncError(communicator, ctypes.byref(state)))
        self._check("NCCL", state.value, communicator)
        return state.value == _SUCCESS

    def group_start(self) -> None:
        """What follows is launched together, by `group_end`."""
        self._check("ncclGroupStart", self._library.ncclGroupStart())

    def group_end(self) -> None:
        """Launch it; wait until the communicator is `ready` before the stream is given anything else."""
        self._check("ncclGroupEnd", self._library.ncclGroupEnd())

    def broadcast(self, communicator: ctypes.c_void_p, address: int, nbytes: int, root: int, stream: int) -> None:
        """Bytes at `address` of the GPU of `root` to `address` of everybody's, in order of their streams."""
        where = ctypes.c_void_p(address)
        status = self._library.ncclBroadcast(
            where, where, ctypes.c_size_t(nbytes), _BYTE, ctypes.c_int(root), communicator, ctypes.c_void_p(stream)
        )
        self._check("ncclBroadcast", status, communicator)

    def sum_float(self, communicator: ctypes.c_void_p, address: int, stream: int) -> None:
        """The sum of everybody's float at `address` of their GPU, to the same place."""
        where = ctypes.c_void_p(address)
        status = self._library.ncclAllReduce(
            where, where, ctypes.c_size_t(1), _FLOAT, _SUM, communicator, ctypes.c_void_p(stream)
        )
        self._check("ncclAllReduce", status, communicator)

    def abort(self, communicator: ctypes.c_void_p) -> None:
        """End it, and what runs of it on the GPU; it is not to be used again."""
        self._check("ncclCommAbort", self._library.ncclCommAbort(communicator))

    def _check(self, what: str, status: int, communicator: ctypes.c_void_p | None = None) -> None:
        if status in (_SUCCESS, _IN_PROGRESS):
            return
        text = (self._library.ncclGetErrorString(status) or b"").decode(errors="replace")
        last = (self._library.ncclGetLastError(communicator) or b"").decode(errors="replace").strip()
        raise TransportBroken(f"{what}: {text.partition(' (run with')[0]}{f' ({last})' if last else ''}")


def settings_here(version: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What has to be the same in all members of a communicator; `version` is that of this process's NCCL."""
    return {"version": version, **{name: environment.get(name, "unset") for name in _MUST_MATCH}}
