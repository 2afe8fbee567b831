"""An update inside one vLLM worker: buckets in, layers reloaded, for both paths of our plugin.

vLLM's layerwise reload holds the tensors of a layer back until the layer is whole. It then processes them as after the
first load, and copies the result over the memory that kernels and CUDA graphs hold. A failed update leaves layers
half-collected. The next update would complete them to a mixture of versions, so they are put back first.
"""

from __future__ import annotations

import secrets
from contextlib import ExitStack, contextmanager
from importlib import import_module
from time import monotonic
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import msgspec
import torch

from weightsync.adapters.held import packed_boxes, sums_of
from weightsync.adapters.places import shown
from weightsync.adapters.versions import serving, updating
from weightsync.adapters.vllm import cpu_repairs
from weightsync.adapters.vllm.names import Fit, ModelNames
from weightsync.adapters.worker import SlotReader
from weightsync.errors import EngineError, LocalProtocolError
from weightsync.plan.replay_facts import NOT_WHOLE
from weightsync.plan.told import SeenExposures, SeenManifests
from weightsync.replay.model import ModelState
from weightsync.replay.state import EXPERTS_MOVE, ModelReplay

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from weightsync.adapters.held import HeldSums
    from weightsync.adapters.places import Shown
    from weightsync.plan.draws import Wants
    from weightsync.replay.bucket import Named

__all__ = ["WeightReload", "worker_index"]

_RELOAD = "vllm.model_executor.model_loader.reload"
_LOADERS_RAISE = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")


def worker_index(parallel_config: Any) -> int:
    """Return the index of this worker in a list for all workers: replica × world size + rank."""
    replica: Any = getattr(parallel_config, "data_parallel_index", None)
    if replica is None:
        replica = getattr(parallel_config, "data_parallel_rank", 0)
    return int(replica) * int(parallel_config.world_size) + int(parallel_config.rank)


class WeightReload:
    """Takes pushes in one worker, and keeps the worker's state between them."""

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        self.incarnation = secrets.token_hex(8)
        self.weight_version = "default"
        self.config = vllm_config  # before vLLM 0.25 None until the daemon's first call
        self._device = device
        self._slots = SlotReader(device)
        self._manifests, self._exposures = SeenManifests(), SeenExposures()
        self._held: int | None = None  # the version that was served last
        self._aliases: dict[str, tuple[str, ...]] = {}  # tensor of the update → its further names
        self._replays: WeakKeyDictionary[torch.nn.Module, ModelReplay] = WeakKeyDictionary()
        self._replay: ModelReplay | None = None  # the open update's
        self._pull = False
        self._update = ""  # the name of the open update, which tells its steps from another daemon's
        if device.type == "cpu":
            cpu_repairs.mend()

    def fit(self, model: torch.nn.Module, manifest: bytes) -> Fit:
        """Say how the tensors of a manifest fit the model, without loading anything."""
        table = self._manifests.of(manifest).tensors
        names = self._names(model)
        further = [other for other, _ in table.aliases if names.parameter_of(other)]
        fit = names.fit([*table.names, *further], whole=self.config.parallel_config.pipeline_parallel_size == 1)
        if self.config.model_config.quantization:  # scales have too many possible names to call one unknown
            fit = fit._replace(unknown=tuple(name for name in fit.unknown if name.endswith((".weight", ".bias"))))
        if self._device.type == "cpu" and self._experts(model) and not cpu_repairs.mended_experts():
            fit = fit._replace(
                partial=("this vllm on CPU does not repack expert weights that are loaded again", *fit.partial)
            )
        return fit

    def open(self, model: torch.nn.Module, model_config: Any = None) -> None:
        """Put back layers that an unfinished update has left half-collected. Later, `ready` must follow `begin`."""
        if self.config is None:
            raise LocalProtocolError("this worker was not asked for its hello", hint="weightsyncd asks for it first")
        self._slots.settle()  # a failed push may have left copies queued
        with self._as_vllm():
            self._put_back(model, model_config or self.config.model_config)

    def begin(
        self,
        version: int,
        manifest: bytes,
        offers: Sequence[bytes],
        seconds: float,
        *,
        pull: bool = False,
        update: str = "",
    ) -> None:
        """Begin an update to `version`: until `finish` this worker is torn.

        `pull`: the loaded weights will be compared, so buckets need no check. `update`: the name that this update's
        steps carry.
        """
        if self._device.type != "cpu":  # a decode step may still be reading the weights
            torch.accelerator.synchronize(self._device)
        self._replay = None
        self._slots.begin(self._manifests.of(manifest), offers, deadline=monotonic() + seconds)
        self._pull, self._update = pull, update
        aliases: dict[str, tuple[str, ...]] = {}
        for other, name in self._slots.manifest.tensors.aliases:
            aliases[name] = (*aliases.get(name, ()), other)
        self._aliases = aliases
        self.weight_version = updating(self._held, version)

    def check_open(self, update: str) -> None:
        """Raise `LocalProtocolError` if the open update is not the one that a step names."""
        if update != self._update:
            raise LocalProtocolError(
                "another update has begun in this worker since", hint="no more than one weightsyncd may name an engine"
            )

    def ready(self, model: torch.nn.Module, *, replays: bool = True) -> None:
        """Prepare the model's layers for loading, after `open` and `begin`.

        With `replays`, layers with a proved load plan are replayed and left out of vLLM's layerwise reload; if all have
        one, the reload does not start. `replays` requires that `close` ends the update.
        """
        layerwise = import_module(f"{_RELOAD}.layerwise")
        if not replays or not hasattr(layerwise, "_place_kernel_tensors"):
            self._initialize(model)
            return
        replay = self._replays.setdefault(model, ModelReplay())
        if getattr(self.config.parallel_config, "enable_eplb", False):
            replay.turn_off(EXPERTS_MOVE)
        replay.begin(self._slots.manifest, model)
        self._replay = replay
        if replay.whole:
            return
        self._initialize(model)
        layers = {name.rpartition(".")[0] for name in replay.replayed}
        for name, layer in model.named_modules():
            info = layerwise.get_layerwise_info(layer)
            if name in layers and info.can_load():  # vLLM itself does this at the end to layers that got no tensors
                layerwise._place_kernel_tensors(layer, info)
                info.reset()

    def _initialize(self, model: torch.nn.Module) -> None:
        with self._as_vllm():
            import_module(_RELOAD).initialize_layerwise_reload(model)

    def replay_facts(self, model: torch.nn.Module) -> Any:
        """Return the facts of the model's replay, as plain data; None before its first push."""
        found = self._replays.get(model)
        return msgspec.to_builtins(found.facts()) if found is not None else None

    def forget(self, model: torch.nn.Module) -> None:
        """Forget the model's load plans, so that they are recorded anew."""
        if (found := self._replays.get(model)) is not None:
            found.forget()

    def held_sums(self, model: torch.nn.Module, digest: bytes) -> HeldSums:
        """Report what the model holds of the push that has ended; `digest` is of its manifest."""
        return sums_of(self._replays.get(model), digest, ModelState.tensors_of(model))

    def held_boxes(self, model: torch.nn.Module, digest: bytes) -> bytes:
        """Return the boxes behind `held_sums`, as packed `ResidentBoxes`."""
        return packed_boxes(self._replays.get(model), digest, ModelState.tensors_of(model))

    def draw(self, exposures: bytes, seconds: float) -> str:
        """Read what the open update needs out of the trainer's memory, instead of all buckets.

        Returns "", or why it cannot; nothing has been read then.
        """
        seen = self._exposures.of(exposures)
        wants = self._wants()
        if wants is None:
            return NOT_WHOLE
        return self._slots.draw(seen, wants, deadline=monotonic() + seconds)

    def places(self, known: Collection[bytes]) -> Shown:
        """Show where bridges may write what the open update needs, instead of all buckets.

        `known` are digests of places that the daemon has been shown before.
        """
        wants = self._wants()
        return shown(NOT_WHOLE, ()) if wants is None else self._slots.places(wants, known)

    def _wants(self) -> Wants | None:
        """Return what the open update needs without buckets; None if a loader has to see some tensors."""
        return self._replay.wants() if self._replay is not None and self._pull else None

    def load(
        self,
        model: torch.nn.Module,
        first: int,
        tickets: Sequence[bytes],
        seconds: float,
        load_weights: Callable[[Any], Any] | None = None,
    ) -> None:
        """Read consecutive buckets from `first` on, and load their tensors into the model.

        `load_weights` is the loader to use if not the model's own. Raises `EngineError` naming tensors that the model
        could not load or ignored.
        """
        deadline = monotonic() + seconds
        for bucket, ticket in enumerate(tickets, first):
            self._load_bucket(model, bucket, ticket, deadline, load_weights or model.load_weights)  # type: ignore[arg-type]

    def _load_bucket(
        self, model: torch.nn.Module, bucket: int, ticket: bytes, deadline: float, load_weights: Callable[[Any], Any]
    ) -> None:
        if self._pull and self._replay is not None and self._slots.lends(bucket) and self._replay.takes(bucket):
            self._slots.pull(bucket, ticket, self._replay.pull, deadline=deadline)
            return
        read = self._slots.read(bucket, ticket, deadline=deadline)

        def load(tensors: list[Named]) -> None:
            self._load(model, bucket, tensors, load_weights)

        if self._replay is not None:
            self._replay.load(read, load)
        else:
            load(read.tensors())

    def _load(
        self, model: torch.nn.Module, bucket: int, tensors: list[Named], load_weights: Callable[[Any], Any]
    ) -> None:
        names = self._names(model)
        for name, tensor in list(tensors):
            tensors += [(other, tensor) for other in self._aliases.get(name, ()) if names.parameter_of(other)]
        try:
            with self._as_vllm():
                loaded = load_weights(iter(tensors))
        except _LOADERS_RAISE as error:  # many of vLLM's loaders assert without a message
            shown = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors[:8])
            raise EngineError(
                f"the model could not load one of {shown}: {type(error).__name__} {error}", bucket=bucket
            ) from error
        if loaded is None:
            return
        tied = names.tied
        placed = {tied.get(name, name) for name in loaded}
        ignored = [
            name
            for name, _ in tensors
            if (parameter := names.parameter_of(name))
            and ".experts." not in parameter  # a worker may have only some of the experts
            and tied.get(parameter, parameter) not in placed
        ]
        if ignored:
            raise EngineError(f"the model ignored {', '.join(ignored[:5])}", bucket=bucket)

    def close(self, model: torch.nn.Module, model_config: Any) -> None:
        """Check that everything came, and complete the reload."""
        replay, whole = self._replay, self._slots.finish()
        if whole and replay is not None:
            replay.drawn()
        finalize = import_module(_RELOAD).finalize_layerwise_reload
        self._replay = None
        with self._as_vllm():
            if replay is None:
                finalize(model, model_config)
            elif replay.whole:
                replay.finish(lambda: ModelState.of(model))
            else:
                replay.watched(lambda: finalize(model, model_config))
                replay.finish(lambda: ModelState.of(model))
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    def check_whole(self) -> None:
        """Check that everything came. For vLLM before 0.25, whose worker completes the reload itself."""
        self._slots.finish()

    def finish(self, version: int) -> None:
        """Note that the loaded weights are `version`, and served."""
        self._held = version
        self.weight_version = serving(version)

    def shutdown(self) -> None:
        """Detach from all arenas."""
        self._slots.close()

    @contextmanager
    def _as_vllm(self) -> Iterator[None]:
        """Set the context that vLLM's loading code expects: its config, no gradients, the device."""
        config = import_module("vllm.config")
        with ExitStack() as stack:
            stack.enter_context(config.set_current_vllm_config(self.config))
            stack.enter_context(torch.no_grad())
            stack.enter_context(self._device)
            yield

    def _put_back(self, model: torch.nn.Module, model_config: Any) -> None:
        """Have layers that an unfinished update left open discard what came, and get their tensors back."""
        info_of = import_module(f"{_RELOAD}.layerwise").get_layerwise_info
        left = [info for layer in model.modules() if (info := info_of(layer)).can_load()]
        for info in left:
            info.load_numel = 0
            info.loaded_weights = []
        if left:
            import_module(_RELOAD).finalize_layerwise_reload(model, model_config)

    def _experts(self, model: torch.nn.Module) -> int:
        config = getattr(model, "config", None)
        config = getattr(config, "text_config", config)
        return next((int(n) for key in _EXPERT_COUNTS if isinstance(n := getattr(config, key, None), int)), 0)

    def _names(self, model: torch.nn.Module) -> ModelNames:
        known: ModelNames | None = getattr(model, "_weightsync_names", None)
        if known is not None:
            return known
        first: dict[int, str] = {}
        tied: dict[str, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if (other := first.setdefault(id(parameter), name)) != name:
                tied[name] = other
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        rename = getattr(mapper, "map_name", None) or getattr(mapper, "_map_name", None)
        known = ModelNames(
            [*first.values(), *tied],
            fused=getattr(model, "packed_modules_mapping", None) or {},
            rename=rename,
            tied=tied,
            experts=self._experts(model),
        )
        if not first:
            raise LocalProtocolError("the model has no parameters")
        model._weightsync_names = known  # type: ignore[assignment]
        return known
