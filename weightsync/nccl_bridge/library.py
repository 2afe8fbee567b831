"""The part of NCCL's C interface that a bridge needs, without calls that wait.

The library is the one that cupy brings or finds, and that torch uses too. Calls go through ctypes, because cupy's own
wrapper raises on ncclInProgress. Communicators here are non-blocking and return it all the time: only so can they be
watched, given up at a deadline and aborted, even while they are being set up.

Source: nccl.h of 2.28 and the "Fault Tolerance" chapter of NVIDIA's user guide. `_Config` has the layout of 2.18, which
later versions accept because it states its size and version.
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
    """NCCL in this process. Every call returns at once, or raises `TransportBroken` with NCCL's text."""

    def __init__(self) -> None:
        """Load it. Raises `ConfigError` if it cannot be loaded."""
        try:
            from cupy.cuda import nccl  # loads the library from wherever this cupy has it

            self._library: Any = ctypes.CDLL("libnccl.so.2")  # finds the one that was just loaded
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
        """Make a unique id. From now on this process listens for members that were told it."""
        made = _UniqueId()
        self._check("ncclGetUniqueId", self._library.ncclGetUniqueId(ctypes.byref(made)))
        return bytes(made)

    def begin(self, world: int, unique_id: bytes, rank: int) -> ctypes.c_void_p:
        """Begin to set up a communicator on the current GPU. It is `ready` once all members have begun."""
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
        """Whether everything that the communicator was asked is done on the host."""
        state = ctypes.c_int()
        self._check("ncclCommGetAsyncError", self._library.ncclCommGetAsyncError(communicator, ctypes.byref(state)))
        self._check("NCCL", state.value, communicator)
        return state.value == _SUCCESS

    def group_start(self) -> None:
        """Hold back the calls that follow, until `group_end` launches them together."""
        self._check("ncclGroupStart", self._library.ncclGroupStart())

    def group_end(self) -> None:
        """Launch the group. Give the stream nothing else before the communicator is `ready`."""
        self._check("ncclGroupEnd", self._library.ncclGroupEnd())

    def broadcast(self, communicator: ctypes.c_void_p, address: int, nbytes: int, root: int, stream: int) -> None:
        """Queue a broadcast from `root` on `stream`, out of or into `nbytes` at `address` of this member's GPU."""
        where = ctypes.c_void_p(address)
        status = self._library.ncclBroadcast(
            where, where, ctypes.c_size_t(nbytes), _BYTE, ctypes.c_int(root), communicator, ctypes.c_void_p(stream)
        )
        self._check("ncclBroadcast", status, communicator)

    def sum_float(self, communicator: ctypes.c_void_p, address: int, stream: int) -> None:
        """Queue an all-reduce on `stream`: the float at `address` becomes the sum of all members'."""
        where = ctypes.c_void_p(address)
        status = self._library.ncclAllReduce(
            where, where, ctypes.c_size_t(1), _FLOAT, _SUM, communicator, ctypes.c_void_p(stream)
        )
        self._check("ncclAllReduce", status, communicator)

    def abort(self, communicator: ctypes.c_void_p) -> None:
        """End the communicator and its kernels on the GPU. It must not be used again."""
        self._check("ncclCommAbort", self._library.ncclCommAbort(communicator))

    def _check(self, what: str, status: int, communicator: ctypes.c_void_p | None = None) -> None:
        if status in (_SUCCESS, _IN_PROGRESS):
            return
        text = (self._library.ncclGetErrorString(status) or b"").decode(errors="replace")
        last = (self._library.ncclGetLastError(communicator) or b"").decode(errors="replace").strip()
        raise TransportBroken(f"{what}: {text.partition(' (run with')[0]}{f' ({last})' if last else ''}")


def settings_here(version: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the settings that must agree in all members of a communicator; `version` is this process's NCCL's."""
    return {"version": version, **{name: environment.get(name, "unset") for name in _MUST_MATCH}}
