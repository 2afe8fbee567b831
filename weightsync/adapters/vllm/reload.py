"""An update inside one vLLM worker: buckets in, layers reloaded, whichever way the daemon's calls came in.

vLLM's layerwise reload holds the tensors of a layer back until it is whole, processes them as after the first load and
copies the result over what the kernels (and CUDA graphs) hold. An update that failed leaves layers half-collected;
taken up again they would be completed with a mixture, so they are put back first.
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
    """Which entry of a list for all workers is this worker's."""
    replica: Any = getattr(parallel_config, "data_parallel_index", None)
    if replica is None:
        replica = getattr(parallel_config, "data_parallel_rank", 0)
    return int(replica) * int(parallel_config.world_size) + int(parallel_config.rank)


class WeightReload:
    """What one worker remembers of the pushes it takes, and how it takes them."""

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        self.incarnation = secrets.token_hex(8)
        self.weight_version = "default"
        self.config = vllm_config  # may come later
        self._device = device
        self._slots = SlotReader(device)
        self._manifests, self._exposures = SeenManifests(), SeenExposures()
        self._held: int | None = None  # the version that was served last
        self._aliases: dict[str, tuple[str, ...]] = {}  # tensor of the update → further names of it
        self._replays: WeakKeyDictionary[torch.nn.Module, ModelReplay] = WeakKeyDictionary()
        self._replay: ModelReplay | None = None  # of the update that is open
        self._pull = False
        self._update = ""  # what tells the update that is open from another daemon's
        if device.type == "cpu":
            cpu_repairs.mend()

    def fit(self, model: torch.nn.Module, manifest: bytes) -> Fit:
        """How the tensors of a manifest fit the model; loads nothing."""
        table = self._manifests.of(manifest).tensors
        names = self._names(model)
        further = [other for other, _ in table.aliases if names.parameter_of(other)]
        fit = names.fit([*table.names, *further], whole=self.config.parallel_config.pipeline_parallel_size == 1)
        if self.config.model_config.quantization:  # scales have too many names to be sure of them
            fit = fit._replace(unknown=tuple(name for name in fit.unknown if name.endswith((".weight", ".bias"))))
        if self._device.type == "cpu" and self._experts(model) and not cpu_repairs.mended_experts():
            fit = fit._replace(
                partial=("this vllm on CPU does not repack expert weights that are loaded again", *fit.partial)
            )
        return fit

    def open(self, model: torch.nn.Module, model_config: Any = None) -> None:
        """Make the model as it was before an update that was begun and did not end. `ready` follows `begin`."""
        if self.config is None:
            raise LocalProtocolError("this worker was not asked for its hello", hint="weightsyncd asks for it first")
        self._slots.settle()  # a push that failed may have left something under way
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
        """From here on this worker is torn until `finish`. `pull`: what is loaded will be compared, so buckets need not
        be. `update`: what the steps of this update say, and those of no other.
        """
        if self._device.type != "cpu":  # a step that is still under way reads what is written from here on
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
        """A step is one of the update that is open. Raises `LocalProtocolError` where another has begun since."""
        if update != self._update:
            raise LocalProtocolError(
                "another update has begun in this worker since", hint="no more than one weightsyncd may name an engine"
            )

    def ready(self, model: torch.nn.Module, *, replays: bool = True) -> None:
        """The update is open and begun: have the model's layers take what is loaded. What may be replayed is from here
        on, if `close` is to end it (`replays`), and where that is everything vLLM's reload has no part in it.
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
            if name in layers and info.can_load():  # as vLLM itself does in the end with layers that got nothing
                layerwise._place_kernel_tensors(layer, info)
                info.reset()

    def _initialize(self, model: torch.nn.Module) -> None:
        with self._as_vllm():
            import_module(_RELOAD).initialize_layerwise_reload(model)

    def replay_facts(self, model: torch.nn.Module) -> Any:
        """What is known of the model's replay, as plain data; None before its first push."""
        found = self._replays.get(model)
        return msgspec.to_builtins(found.facts()) if found is not None else None

    def forget(self, model: torch.nn.Module) -> None:
        """Learn anew how the model is loaded."""
        if (found := self._replays.get(model)) is not None:
            found.forget()

    def held_sums(self, model: torch.nn.Module, digest: bytes) -> HeldSums:
        """What lies in the model of the push that has ended, whose manifest has this digest."""
        return sums_of(self._replays.get(model), digest, ModelState.tensors_of(model))

    def held_boxes(self, model: torch.nn.Module, digest: bytes) -> bytes:
        """Of which boxes `held_sums` speaks."""
        return packed_boxes(self._replays.get(model), digest, ModelState.tensors_of(model))

    def draw(self, exposures: bytes, seconds: float) -> str:
        """Read what the open update needs out of the trainer's memory, instead of all buckets. Returns "", or, with
        nothing read, why it cannot.
        """
        seen = self._exposures.of(exposures)
        wants = self._wants()
        if wants is None:
            return NOT_WHOLE
        return self._slots.draw(seen, wants, deadline=monotonic() + seconds)

    def places(self, known: Collection[bytes]) -> Shown:
        """Where others may write what the open update needs, instead of all buckets; the daemon knows places of these
        digests already.
        """
        wants = self._wants()
        return shown(NOT_WHOLE, ()) if wants is None else self._slots.places(wants, known)

    def _wants(self) -> Wants | None:
        """What the open update comes to without buckets; None where a loader has to see some."""
        return self._replay.wants() if self._replay is not None and self._pull else None

    def load(
        self,
        model: torch.nn.Module,
        first: int,
        tickets: Sequence[bytes],
        seconds: float,
        load_weights: Callable[[Any], Any] | None = None,
    ) -> None:
        """Read the buckets from `first` on and hand their tensors to the model. Raises `EngineError` naming what the
        model ignored.
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
        except _LOADERS_RAISE as error:  # many of its loaders assert, without a word
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
            and ".experts." not in parameter  # a worker has some of the experts only
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
        """Check that everything came, where vLLM's worker itself completes the reload."""
        self._slots.finish()

    def finish(self, version: int) -> None:
        """What was loaded is `version`."""
        self._held = version
        self.weight_version = serving(version)

    def shutdown(self) -> None:
        """Detach from all arenas."""
        self._slots.close()

    @contextmanager
    def _as_vllm(self) -> Iterator[None]:
        """What vLLM's loading code expects around it."""
        config = import_module("vllm.config")
        with ExitStack() as stack:
            stack.enter_context(config.set_current_vllm_config(self.config))
            stack.enter_context(torch.no_grad())
            stack.enter_context(self._device)
            yield

    def _put_back(self, model: torch.nn.Module, model_config: Any) -> None:
        """Layers that an earlier update began and did not end get their tensors back, and forget what came."""
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
