"""slime: a weight updater that pushes through weightsyncd.

    --custom-megatron-init-path weightsync.integrations.slime.install

slime has a fixed set of `UpdateWeight*` classes and no flag to add another. `install` runs in each training actor
before the actor chooses one, and makes it choose `UpdateWeightFromWeightsync`. Options are in `args.weightsync`, a
mapping that `--custom-config-path FILE.yaml` sets:

    weightsync: {model: policy, pause: abort, timeout: 600, router: "http://10.0.0.1:30000"}

slime is not on PyPI. This was written from its sources, and not run with them: `slime/backends/megatron_utils/actor.py`
(028e290), `…/initialize.py` (1d907a2), `…/update_weight/update_weight_from_disk.py` (5a3552f),
`…/hf_weight_iterator_direct.py` (102a6b3) and `slime/backends/sglang_utils/sglang_engine.py` (03b32d8).
"""

from __future__ import annotations

import logging
import re
from importlib import import_module
from typing import TYPE_CHECKING, Any

from weightsync.config import EngineConfig
from weightsync.errors import ConfigError, WeightSyncError
from weightsync.integrations.outcome import noted
from weightsync.integrations.router import Router
from weightsync.integrations.shares import rank_and_world, share
from weightsync.integrations.versions import Versions, endpoint_of
from weightsync.operator import change_engines, fetch_status
from weightsync.trainer.client import push_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from weightsync.report import PushReport
    from weightsync.wire.messages import EngineStatus

__all__ = ["UpdateWeightFromWeightsync", "install"]

logger = logging.getLogger(__name__)

_ACTOR = "slime.backends.megatron_utils.actor"
_ITERATORS = "slime.backends.megatron_utils.update_weight.hf_weight_iterator"
# The actor's names of its updater: one of these classes or, in later versions, a function with the same arguments.
_CHOICES = ("create_weight_updater", "UpdateWeightFromTensor", "UpdateWeightFromDistributed", "UpdateWeightFromDisk")
_STATUS_SECONDS = 10.0  # a fresh look at all nodes takes as long as its slowest engine
_PREFIX = "slime-"  # names of engines that this module adds begin with it


def install(args: Any) -> None:
    """Make slime's training actor in this process use `UpdateWeightFromWeightsync` instead of its own classes.

    Raises `ConfigError` if this slime has none of the names that are replaced.
    """
    actor = import_module(_ACTOR)
    found = [name for name in _CHOICES if hasattr(actor, name)]
    if not found:
        raise ConfigError(f"{_ACTOR} has none of {', '.join(_CHOICES)}", hint="this slime is not one that was read")
    for name in found:
        setattr(actor, name, UpdateWeightFromWeightsync)


class UpdateWeightFromWeightsync:
    """A weight updater for slime's training actors, with the arguments and methods of slime's own.

    slime gathers every tensor on every rank, a few at a time, under its Hugging Face name. Each rank keeps its share of
    the tensors, and all push together. The lock that slime passes is not taken: two pushes of a model never run at
    once, and the communicators are the daemon's.
    """

    def __init__(
        self,
        args: Any,
        model: Sequence[Any],
        weights_getter: Callable[[], Mapping[str, Any]],
        *,
        model_name: str,
        quantization_config: dict[str, Any] | None,
    ) -> None:
        self.weight_version = 0  # slime compares it with the engines' version
        self.report: PushReport | None = None
        self._metrics: dict[str, float] = {}
        options = dict(getattr(args, "weightsync", None) or {})
        self._kind = options.pop("kind", "sglang")
        self._register = options.pop("register", True)
        router = options.pop("router", None)
        self._options = options
        self._model, self._daemon = options.get("model", "default"), options.get("daemon")
        self._versions = Versions(options)
        self._router = Router(router) if router and rank_and_world()[0] == 0 else None
        self._weights_getter = weights_getter
        self._chunks = _iterator(args)(
            args=args, model=model, model_name=model_name, quantization_config=quantization_config
        )

    def connect_rollout_engines(self, rollout_engines: Sequence[Any], rollout_engine_lock: Any, **_: Any) -> None:
        """Add slime's engines to rank 0's daemon, which looks at each, and remove those that slime has replaced.

        An engine whose URL the daemon or one of its peers already has is left alone; with
        `weightsync: {register: false}` all are. Raises `ConfigError`, `PushRefused` and `DaemonLost`.
        """
        if not self._register or rank_and_world()[0] != 0:
            return
        ray: Any = import_module("ray")
        hosts = ray.get([engine.get_server_host.remote() for engine in rollout_engines])
        ports = ray.get([engine.get_server_port.remote() for engine in rollout_engines])
        urls = {f"http://{host}:{port}" for host, port in zip(hosts, ports, strict=True)}
        known = fetch_status(endpoint_of(self._daemon))
        gone = [
            e.name
            for e in known.engines
            if e.node == known.node and e.model == self._model and e.name.startswith(_PREFIX) and e.url not in urls
        ]
        new = sorted(urls - {e.url.rstrip("/") for e in known.engines})
        added = [EngineConfig(name=_name(url), kind=self._kind, url=url, model=self._model) for url in new]
        if added or gone:
            change_engines(endpoint_of(self._daemon), add=added, remove=gone)

    def disconnect_rollout_engines(self) -> None:
        """Do nothing: this process shares no group with an engine."""

    def update_weights(self) -> None:
        """Push; all ranks call it. Then tell the `router`, if there is one, which engines have the new version.

        A failure at the router is logged, and tried again after the next push. Raises as `push_weights`.
        """
        version = self._versions.of(self.weight_version + 1)
        rank, world = rank_and_world()
        try:
            mine = dict(share(self._named(), rank, world))
            self.report = noted(push_weights(mine, version=version, **self._options))
            self.weight_version = version
            self._metrics = {"weightsync/seconds": self.report.seconds, "weightsync/bytes": float(self.report.bytes)}
        finally:  # however the push ended, the router must not pass requests to torn engines
            self._show()

    def _show(self) -> None:
        if self._router is None:
            return
        try:
            self._router.show(self._engines())
        except (
            WeightSyncError
        ):  # happens on this rank alone; raised, it would end the training, or hide the push's own error
            logger.exception("the router does not pass requests as it should")

    def pop_metrics(self) -> dict[str, float]:
        """Return what slime logs about the last update; nothing on a second call, until the next update."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def _named(self) -> Iterator[tuple[str, Any]]:
        for chunk in self._chunks.get_hf_weight_chunks(self._weights_getter()):
            yield from chunk

    def _engines(self) -> list[EngineStatus]:
        engines = fetch_status(endpoint_of(self._daemon), timeout=_STATUS_SECONDS, fresh=True).engines
        return [e for e in engines if e.model == self._model and not e.frozen]


def _iterator(args: Any) -> Any:
    """Return slime's class that turns Megatron's parameters into Hugging Face's, by `--megatron-to-hf-mode`."""
    bridge = getattr(args, "megatron_to_hf_mode", "raw") == "bridge"
    kind, name = ("bridge", "HfWeightIteratorBridge") if bridge else ("direct", "HfWeightIteratorDirect")
    return getattr(import_module(f"{_ITERATORS}_{kind}"), name)


def _name(url: str) -> str:
    return _PREFIX + re.sub(r"[^A-Za-z0-9.-]", "-", url.removeprefix("http://"))
