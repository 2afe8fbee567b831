"""Where an engine's own code looks for what rank 0 of a group has left for its ranks: keys of a rendezvous.

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

_FIRST = "0"  # communicators of a process group are counted
_FIRST_OBJECT = "broadcast_from/0/0"  # of rank 0, which are counted too
_UNPICKLE = Global("_ctypes", "_unpickle")  # how Python pickles structures of C
_UNIQUE_ID = Global("vllm.distributed.device_communicators.pynccl_wrapper", "ncclUniqueId")


class TorchMeeting:
    """Under the group's name, once for whoever wrote the engine's function and once for torch's, and under the device
    that comes first for the backend. The name is the secret, and says which group.
    """

    def __init__(self, rendezvous: Rendezvous, name: str, *, device: str) -> None:
        """`device`: "cpu" for gloo, "cuda" for NCCL."""
        self.sockets = rendezvous.sockets
        self._store = prefixed(rendezvous.raw, name, f"{name}/", f"{device}/")

    def store(self, key: str, generation: int) -> Any:
        """See `weightsync.nccl_bridge.rendezvous.Meeting`."""
        return self._store

    def tell(self, unique_id: bytes) -> None:
        """Leave NCCL's unique id, as long as `store` can be reached."""
        self._store.set(_FIRST, unique_id)


class VllmMeeting:
    """Objects, pickled, one after the other, whose keys are the same in every group: each has its own rendezvous."""

    def __init__(self, rendezvous: Rendezvous) -> None:
        self._store = rendezvous.raw

    def tell(self, unique_id: bytes) -> None:
        """Leave NCCL's unique id."""
        self._store.set(_FIRST_OBJECT, dumps(Call(_UNPICKLE, (_UNIQUE_ID, ({}, unique_id)))))
