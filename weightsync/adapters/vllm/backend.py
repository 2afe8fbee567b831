"""The weight-transfer backend `weightsync`: vLLM's own routes and state, our tickets, no pickles.

vLLM's base class changed in 0.25. Before, vLLM's worker opened and closed the layerwise reload itself and passed the
model's loader to `receive_weights`, and the constructor got only a `parallel_config` and the model. This class serves
both; the routes and the contents of the calls are the same.
"""

from __future__ import annotations

from base64 import b64decode
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from weightsync.adapters.vllm.reload import WeightReload, worker_index
from weightsync.errors import LocalProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["InitInfo", "UpdateInfo", "WeightSyncEngine"]


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing has to be agreed on. The field `weightsync` distinguishes this backend from all others."""

    weightsync: int = 1


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One step of an update, for all workers: lists are indexed by replica × world size + rank.

    The fields mean the same as in the `Request` of extension.py.
    """

    do: str
    version: int = 0
    manifest: str = ""  # packed, or the digest of one that the worker has seen; base64, like all bytes here
    offers: list[list[str]] = field(default_factory=list)
    bucket: int = 0
    tickets: list[list[str]] = field(default_factory=list)  # one list for each bucket from `bucket` on
    pull: bool = False
    anew: bool = False
    seconds: float = 0.0
    update: str = ""


class WeightSyncEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """The backend in one worker. vLLM makes it after the model is loaded."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        device = getattr(self, "device", None) or next(self.model.parameters()).device
        # before 0.25 vLLM passes no configuration here; the daemon's first call brings it
        self.weightsync = WeightReload(getattr(self, "vllm_config", None), torch.device(device))

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Do nothing: there is nothing to agree on."""

    def start_weight_update(self) -> None:
        """Open the layerwise reload (from vLLM 0.25 on)."""
        self.weightsync.open(self.model, self.model_config)

    def finish_weight_update(self) -> None:
        """Close the layerwise reload (from vLLM 0.25 on)."""
        self.weightsync.close(self.model, self.model_config)

    def receive_weights(self, update_info: UpdateInfo, load_weights: Callable[[Any], Any] | None = None) -> None:
        """Do one step of an update."""
        info = update_info
        index = worker_index(self.parallel_config)
        match info.do:
            case "begin":
                if load_weights is not None:  # vLLM's worker opened the reload, over the rest of an earlier update
                    self.weightsync.open(self.model)
                offers = [b64decode(offer) for offer in info.offers[index]]
                manifest = b64decode(info.manifest)
                self.weightsync.begin(info.version, manifest, offers, info.seconds, pull=info.pull, update=info.update)
                if info.anew:
                    self.weightsync.forget(self.model)
                self.weightsync.ready(self.model, replays=load_weights is None)
            case "load":
                self.weightsync.check_open(info.update)
                tickets = [b64decode(of_bucket[index]) for of_bucket in info.tickets]
                self.weightsync.load(self.model, info.bucket, tickets, info.seconds, load_weights)
            case "check-whole":
                self.weightsync.check_whole()
            case "abandon":
                raise LocalProtocolError("abandoned, as was asked")  # vLLM closes an update that fails
            case _:
                raise LocalProtocolError(f"a vLLM worker cannot do {info.do!r}")

    def shutdown(self) -> None:
        """Detach from all arenas."""
        self.weightsync.shutdown()

    def trainer_send_weights(self, *args: Any, **kwargs: Any) -> None:
        """Raise `NotImplementedError`. vLLM's base class demands the method up to 0.27; the daemon sends weights."""
        raise NotImplementedError("weightsyncd sends the weights")
