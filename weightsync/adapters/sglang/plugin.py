"""The plugin inside SGLang's scheduler processes: takes the daemon's orders and loads tensors into the model.

    [project.entry-points."sglang.srt.plugins"]
    weightsync = "weightsync.adapters.sglang.plugin:register"

SGLang has hooks from 0.5.12 on. The hook on `check_weights` takes an order from the `action` of `/weights_checker`
(`orders.py`); any other action is SGLang's own. The hook on `get_internal_state` adds to `/server_info` that the plugin
is there, and state that the server itself does not say; later the daemon asks for that state alone, by an order. A
third hook, in fp8 layers, is `requantise.quantise_once`.

The hook on `check_weights` answers with errors instead of raising them, because an exception would end the scheduler.
Ranks agree on every answer, since SGLang sends only rank 0's.
"""

from __future__ import annotations

import logging
import multiprocessing
import secrets
import sys
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from time import monotonic
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import msgspec
import torch
import torch.distributed

from weightsync.adapters.held import packed_boxes, sums_of
from weightsync.adapters.places import shown
from weightsync.adapters.sglang import orders
from weightsync.adapters.sglang.derived import forget_embeddings, why_not_updated
from weightsync.adapters.sglang.names import look_up
from weightsync.adapters.sglang.requantise import HOOKED, Requantiser, quantise_once, remembered
from weightsync.adapters.worker import SlotReader
from weightsync.errors import CodecError, LocalProtocolError, WeightSyncError
from weightsync.plan.replay_facts import NOT_WHOLE
from weightsync.plan.told import SeenExposures, SeenManifests
from weightsync.replay.model import ModelState
from weightsync.replay.state import EXPERTS_MOVE, ModelReplay

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightsync.plan.draws import Wants
    from weightsync.replay.bucket import Named

__all__ = ["register"]

logger = logging.getLogger(__name__)

_SCHEDULER = "sglang.srt.managers.scheduler"
_HOMES = (  # where check_weights is, newest first
    ("sglang.srt.managers.scheduler_components.weight_updater", "SchedulerWeightUpdaterManager"),
    ("sglang.srt.managers.scheduler_update_weights_mixin", "SchedulerUpdateWeightsMixin"),
)
_REASON = 1024  # bytes of an error's text that ranks exchange


class _Worker:
    """One rank's state: its slot reader, the open update, and the load plans of its models."""

    def __init__(self) -> None:
        self.incarnation = secrets.token_hex(8)
        self.scheduler: Any = None  # known once `/server_info` was asked for
        self._slots: SlotReader | None = None
        self._manifests, self._exposures = SeenManifests(), SeenExposures()
        self._models: list[Any] = []
        self._pull = False
        self._update = ""  # the name of the open update, which tells its steps from another daemon's
        self._requantisers: list[Requantiser] = []
        self._replays: WeakKeyDictionary[Any, ModelReplay] = WeakKeyDictionary()

    def obey(self, manager: Any, order: orders.AnyOrder) -> str | bytes:
        """Carry out one order and return the answer. If the answer is bytes, all ranks' answers are sent.

        Raises whatever goes wrong.
        """
        rank = torch.distributed.get_rank(manager.tp_cpu_group)
        match order:
            case orders.Accept():
                return self._accept(_models(manager, order.target), order)
            case orders.Begin():
                return self._begin(_models(manager, order.target), order, rank, experts_move=_experts_move(manager))
            case orders.Draw():
                return self._draw(order)
            case orders.Places():
                return self._places(order)
            case orders.Load():
                return self._load(order, rank)
            case orders.Finish():
                return self._finish(order)
            case orders.Sums():
                model = _models(manager, order.target)[0]
                return msgspec.msgpack.encode(
                    sums_of(self._replays.get(model), order.manifest, ModelState.tensors_of(model))
                )
            case orders.Boxes():
                model = _models(manager, order.target)[0]
                return packed_boxes(self._replays.get(model), order.manifest, ModelState.tensors_of(model))
            case orders.State():
                return msgspec.json.encode(self._state()).decode()

    def state_of(self, scheduler: Any) -> dict[str, Any]:
        """Return the plugin's part of `/server_info`, as plain data."""
        self.scheduler = scheduler
        return self._state()

    def _accept(self, models: list[Any], order: orders.Accept) -> str:
        if refused := why_not_updated(models):
            return msgspec.json.encode(orders.Accepted(refused=refused)).decode()
        manifest = self._manifests.of(order.manifest)
        nowhere: set[str] = set(manifest.tensors.names)
        looked_up = [look_up(model, manifest.tensors.names) for model in models]
        for missing, _ in looked_up:
            nowhere &= set(missing)  # a name is known if the target or its draft has it
        unknown = tuple(name for name in manifest.tensors.names if name in nowhere)
        left = looked_up[0][1]
        untouched = None if left is None else tuple(left)
        return msgspec.json.encode(orders.Accepted(unknown=unknown, untouched=untouched)).decode()

    def _begin(self, models: list[Any], order: orders.Begin, rank: int, *, experts_move: bool) -> str:
        if refused := why_not_updated(models):  # stock SGLang asks before each update, too
            raise LocalProtocolError(refused)
        device = next(models[0].parameters()).device
        if device.type != "cpu":
            torch.accelerator.synchronize(device)  # an `in_place` pause leaves a queued step, which reads the weights
        if self._slots is None or self._slots.device != device:
            self._slots = SlotReader(device)
        self._models = []
        for earlier in self._requantisers:
            earlier.abandon()
        self._requantisers = []
        manifest = self._manifests.of(order.manifest)
        self._slots.begin(manifest, order.offers[rank], deadline=monotonic() + order.seconds)
        self._requantisers = [Requantiser(model, manifest.tensors.names) for model in models]
        for model in models:
            replay = self._replays.setdefault(model, ModelReplay())
            if experts_move:
                replay.turn_off(EXPERTS_MOVE)
            if order.anew:
                replay.forget()
            replay.begin(manifest, model)
        # only the first model is compared afterwards, so with several nothing may come unchecked
        self._models, self._pull = models, order.pull and len(models) == 1
        self._update = order.update
        return "begun"

    def _open(self, step: orders.Step) -> SlotReader:
        """Return the reader of the open update. Raises `LocalProtocolError` if the step is not of that update."""
        if self._slots is None or not self._models:
            raise LocalProtocolError("no update is open", hint="begin first")
        if step.update != self._update:
            raise LocalProtocolError(
                "another update has begun in this worker since", hint="no more than one weightsyncd may name an engine"
            )
        return self._slots

    def _draw(self, order: orders.Draw) -> bytes:
        slots = self._open(order)
        exposures = self._exposures.of(order.exposures)
        wants = self._wants()
        if wants is None:
            return NOT_WHOLE.encode()
        return slots.draw(exposures, wants, deadline=monotonic() + order.seconds).encode()

    def _places(self, order: orders.Places) -> bytes:
        slots, wants = self._open(order), self._wants()
        found = shown(NOT_WHOLE, ()) if wants is None else slots.places(wants, order.known)
        return found.pack()

    def _wants(self) -> Wants | None:
        """Return what the open update needs without buckets; None if a loader has to see some tensors."""
        return self._replays[self._models[0]].wants() if self._pull else None

    def _load(self, order: orders.Load, rank: int) -> str:
        slots, deadline = self._open(order), monotonic() + order.seconds
        for bucket, tickets in enumerate(order.tickets, order.bucket):
            self._load_bucket(slots, bucket, tickets[rank], deadline)
        return "loaded"

    def _load_bucket(self, slots: SlotReader, number: int, ticket: bytes, deadline: float) -> None:
        replays = [self._replays[model] for model in self._models]
        if self._pull and slots.lends(number) and replays[0].takes(number):
            slots.pull(number, ticket, replays[0].pull, deadline=deadline)
            return
        bucket = slots.read(number, ticket, deadline=deadline)
        for model, requantiser, replay in zip(self._models, self._requantisers, replays, strict=True):

            def load(tensors: list[Named], model: Any = model, requantiser: Requantiser = requantiser) -> None:
                with requantiser.loading([name for name, _ in tensors]):
                    model.load_weights(list(tensors))

            replay.load(bucket, load)

    def _finish(self, order: orders.Finish) -> str:
        slots = self._open(order)
        models, self._models = self._models, []
        if slots.finish():
            self._replays[models[0]].drawn()
        for requantiser in self._requantisers:
            requantiser.finish()
        for model in models:
            self._replays[model].finish(partial(ModelState.of, model))
        forget_embeddings()
        return "finished"

    def _state(self) -> dict[str, Any]:
        scheduler = self.scheduler
        if scheduler is None:
            raise LocalProtocolError("the scheduler was never asked for its state", hint="/server_info first")
        model = scheduler.tp_worker.model_runner.model
        replay = self._replays.get(model)
        return {
            "protocol": orders.PROTOCOL,
            "incarnation": self.incarnation,
            "paused": bool(getattr(scheduler, "_engine_paused", False)),
            "asleep": sorted(getattr(getattr(scheduler, "weight_updater", scheduler), "offload_tags", ())),
            "requantises": remembered(model),
            "replay": msgspec.to_builtins(replay.facts()) if replay is not None else None,
        }


_worker = _Worker()


def register() -> None:
    """Hook the scheduler, in the processes that import it. Called by SGLang."""
    if multiprocessing.parent_process() is not None and _SCHEDULER not in sys.modules:
        return  # the detokenizer, where importing the scheduler would only cost memory; the server imports it anyway
    hooks = import_module("sglang.srt.plugins.hook_registry")
    home = next((f"{module}.{name}" for module, name in _HOMES if find_spec(module) is not None), None)
    if home is None:
        logger.error("weightsync: this SGLang has no check_weights where it was in 0.5.12 to 0.5.23; the plugin is off")
        return
    hooks.HookRegistry.register(f"{home}.check_weights", _check_weights, hooks.HookType.AROUND)
    for method in HOOKED:
        hooks.HookRegistry.register(f"{method}.process_weights_after_loading", quantise_once, hooks.HookType.AROUND)
    hooks.HookRegistry.register(f"{_SCHEDULER}.Scheduler.get_internal_state", _get_internal_state, hooks.HookType.AFTER)


def _check_weights(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    reply = import_module("sglang.srt.managers.io_struct").CheckWeightsReqOutput
    try:
        order = orders.decode(request.action)
    except CodecError as error:
        return reply(success=False, message=str(error))
    if order is None:
        return original(manager, request)
    answer: str | bytes = ""
    problem = ""
    try:
        answer = _worker.obey(manager, order)
    except WeightSyncError as error:
        logger.warning("weightsync: %s failed: %s", type(order).__name__, error)
        problem = str(error)
    except Exception as error:
        logger.exception("weightsync: %s failed", type(order).__name__)
        problem = f"{type(error).__name__}: {error}"
    problem = _agree(problem, manager.tp_cpu_group)
    if isinstance(answer, bytes) and not problem:
        try:
            answer = orders.pack_answers(_gathered(answer, manager.tp_cpu_group))
        except Exception as error:
            logger.exception("weightsync: the answers of all ranks cannot be put together")
            problem = f"{type(error).__name__}: {error}"
    return reply(success=not problem, message=problem or answer)


def _agree(problem: str, group: Any) -> str:
    """Return the problem of the lowest rank that has one; "" if none has."""
    size = torch.distributed.get_world_size(group)
    if size == 1:
        return problem
    mine = torch.zeros(_REASON, dtype=torch.uint8)
    text = problem.encode()[:_REASON]
    mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else mine[:0]
    all_ranks = [torch.zeros_like(mine) for _ in range(size)]
    torch.distributed.all_gather(all_ranks, mine, group=group)
    for rank, told in enumerate(all_ranks):
        text = bytes(told.tolist()).rstrip(b"\0")
        if text:
            return f"tp rank {rank}: {text.decode('utf-8', 'replace')}"
    return ""


def _gathered(mine: bytes, group: Any) -> list[bytes]:
    """Gather every rank's bytes, in the order of ranks."""
    size = torch.distributed.get_world_size(group)
    if size == 1:
        return [mine]
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    torch.distributed.all_gather(lengths, torch.tensor([len(mine)]), group=group)
    longest = max(int(length) for length in lengths)
    if not longest:
        return [b""] * size
    padded = torch.frombuffer(bytearray(mine.ljust(longest, b"\0")), dtype=torch.uint8)
    all_ranks = [torch.empty(longest, dtype=torch.uint8) for _ in range(size)]
    torch.distributed.all_gather(all_ranks, padded, group=group)
    return [one.numpy().tobytes()[: int(length)] for one, length in zip(all_ranks, lengths, strict=True)]


def _models(manager: Any, target: str) -> list[Any]:
    """Return the models that `target` (SGLang's selector) stands for, the served one first."""
    if hasattr(manager, "_select_runners"):
        return [runner.model for _, runner in manager._select_runners(target)]
    if target != "target" and manager.draft_worker is not None:
        raise LocalProtocolError(
            "before SGLang 0.5.21 the plugin loads into the served model only, and this server has a draft model",
            hint='target = "model", or path = "tensor"',
        )
    return [manager.tp_worker.model_runner.model]


def _experts_move(manager: Any) -> bool:
    """Whether SGLang moves experts while it serves."""
    runner = getattr(getattr(manager, "tp_worker", None), "model_runner", None)
    return getattr(runner, "eplb_manager", None) is not None


def _get_internal_state(result: Any, scheduler: Any, *_: Any) -> None:
    try:
        state = _worker.state_of(scheduler)
    except Exception:  # raised further, it would end the scheduler
        logger.exception("weightsync: the scheduler of this SGLang cannot be read; the plugin does not show itself")
        return
    result.internal_state["weightsync"] = state
