"""Keys of a rendezvous under which rank 0 of a group tells an engine's own code how to join.

Source: `_new_process_group_helper` of torch.distributed and `broadcastUniqueNCCLID` of its ProcessGroupNCCL (torch 2.9
and 2.11), as `init_custom_process_group` of SGLang calls them; `StatelessProcessGroup.broadcast_obj` and
`PyNcclCommunicator` of vLLM 0.26 and 0.32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightsync.nccl_bridge.rendezvous import prefixed
from weightsync.pickling import Call, Global, dumps

if TYPE_CHECKING:
    from weightsync.nccl_bridge.rendezvous import Rendezvous

__all__ = ["TorchMeeting", "VllmMeeting"]

_FIRST = "0"  # torch counts the communicators of a process group
_FIRST_OBJECT = "broadcast_from/0/0"  # vLLM counts the objects that rank 0 broadcasts
_UNPICKLE = Global("_ctypes", "_unpickle")  # how Python pickles structures of C
_UNIQUE_ID = Global("vllm.distributed.device_communicators.pynccl_wrapper", "ncclUniqueId")


class TorchMeeting:
    """Keys of torch's process groups: the prefixes are the group's name, twice, and the backend's first device.

    The engine's function adds the name once, torch once more. The name is secret, and tells groups apart.
    """

    def __init__(self, rendezvous: Rendezvous, name: str, *, device: str) -> None:
        """`device`: "cpu" for gloo, "cuda" for NCCL."""
        self.sockets = rendezvous.sockets
        self._store = prefixed(rendezvous.raw, name, f"{name}/", f"{device}/")

    def store(self, key: str, generation: int) -> Any:
        """See `weightsync.nccl_bridge.rendezvous.Meeting`."""
        return self._store

    def tell(self, unique_id: bytes) -> None:
        """Leave NCCL's unique id where torch looks for it."""
        self._store.set(_FIRST, unique_id)


class VllmMeeting:
    """Keys of vLLM's `StatelessProcessGroup`: numbered pickled objects.

    The keys are the same in every group, so each group needs a rendezvous of its own.
    """

    def __init__(self, rendezvous: Rendezvous) -> None:
        self._store = rendezvous.raw

    def tell(self, unique_id: bytes) -> None:
        """Leave NCCL's unique id where vLLM looks for it."""
        self._store.set(_FIRST_OBJECT, dumps(Call(_UNPICKLE, (_UNIQUE_ID, ({}, unique_id)))))
