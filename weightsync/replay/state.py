"""One model's way from its loader to a replay that is proved, push by push.

    record    the loader loads and is watched
    prove     it loads again, and the replay into scratch must come to the same bits
    replay    no loader, but for what it has to go on with

Each manifest begins anew, and so does a model whose parameters have moved (a sleep, an adapter, experts shuffled).
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import msgspec
import torch

from weightsync.replay.moves import Moves, apply, lay_out, raw_bytes, strided_view
from weightsync.replay.plan import LoadPlan
from weightsync.replay.proof import Proof
from weightsync.replay.recorder import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from weightsync.plan.manifest import Manifest
    from weightsync.replay.bucket import Named, ReadBucket

__all__ = ["SWITCH", "ModelReplay", "Phase", "ReplayFacts", "model_tensors"]

logger = logging.getLogger(__name__)

SWITCH = "WEIGHTSYNC_REPLAY"  # of the engine's environment: 0 leaves everything to its loader
Phase = Literal["off", "record", "prove", "replay", "loader"]
_NAMES_TOLD = 4  # of parameters with the same reason

T = TypeVar("T")


class ReplayFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a worker says of its replay of one model."""

    phase: str  # of the last push, see `Phase`
    targets: int = 0  # parameters and buffers that are replayed, or will be once that is proved
    nbytes: int = 0  # their size
    loader_targets: int = 0  # that stay with the loader
    loader_nbytes: int = 0
    moves: int = 0  # copies that a push comes to, neighbours joined
    why: dict[str, list[str]] = {}  # why the loader loads them → the first of them, and "… and n more"
    note: str = ""  # why all began anew, or is off
    seconds: dict[str, float] = {}  # in each phase, seconds of the last push's loading; of prove the loader's alone


class _Place(NamedTuple):
    """What has to be as it was for a plan to be of use."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class _Known:
    """What was learnt of one manifest."""

    digest: bytes
    places: dict[str, _Place]
    plan: LoadPlan
    moves: Moves
    proved: bool = False


def model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers, by their first names."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


class ModelReplay:
    """Of one model in one worker. Not for several threads."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._off = environment.get(SWITCH, "1").strip().lower() in ("0", "off", "false", "no")
        self._known: _Known | None = None
        self._phase: Phase = "off"
        self._note = f"{SWITCH} is {environment.get(SWITCH)}" if self._off else ""
        self._manifest: Manifest | None = None
        self._targets: dict[str, torch.Tensor] = {}
        self._order: dict[int, torch.Tensor] = {}  # targets as moves count them
        self._recorder: Recorder | None = None
        self._proof: Proof | None = None
        self._filled = False
        self._seconds: Counter[str] = Counter()

    @property
    def replayed(self) -> frozenset[str]:
        """Parameters that this push loads without the loader; their layers get nothing from it."""
        return frozenset(self._known.plan.targets) if self._phase == "replay" and self._known is not None else frozenset()

    def begin(self, manifest: Manifest, targets: Mapping[str, torch.Tensor]) -> None:
        """A push of this manifest begins, whatever became of the last. `targets` as `model_tensors`."""
        self._recorder = self._proof = None
        if self._off:
            return
        self._manifest, self._targets = manifest, dict(targets)
        places = _places(targets)
        known = self._known
        if known is not None and (anew := _why_anew(known, manifest, places)):
            logger.info("weightsync: replay begins anew: %s", anew)
            self._note, known = anew, None
        self._known, self._filled = known, False
        if known is None:
            self._phase, self._recorder = "record", Recorder(targets)
        elif not known.plan.targets:
            self._phase = "loader"
        else:
            self._order = {i: targets[name] for i, name in enumerate(known.moves.targets)}
            self._phase = "replay" if known.proved else "prove"
            self._proof = None if known.proved else self._new_proof(known)
        self._seconds[self._phase] = 0.0

    def load(self, bucket: ReadBucket, load: Callable[[list[Named]], T]) -> T | None:
        """Load one bucket. `load` takes names and tensors; what it returned, or None where it was not called."""
        begun = perf_counter()
        if self._phase == "replay":
            left = self._replay(bucket)
            answer = load(left) if left else None
            self._seconds["replay"] += perf_counter() - begun
            return answer
        tensors = bucket.tensors()
        if self._recorder is not None:
            for name, tensor in tensors:
                self._recorder.offer(name, tensor)
        if not tensors:
            return None
        answer = self.watched(lambda: load(tensors))
        self._seconds[self._phase] += perf_counter() - begun
        if self._proof is not None:
            self._try_proof(self._proof, bucket)
        return answer

    def watched(self, work: Callable[[], T]) -> T:
        """`work`, which may load something, seen by the recorder if there is one."""
        if self._recorder is None:
            return work()
        with self._recorder:
            return work()

    def finish(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Everything is loaded; the model's tensors now. What was learnt counts from the next push on."""
        recorder, proof, known = self._recorder, self._proof, self._known
        self._recorder = self._proof = None
        if recorder is not None and self._manifest is not None:
            plan = recorder.plan()
            before, after = _places(self._targets), _places(targets)
            moved = {name: "the loader gives it other memory" for name in before if after.get(name) != before[name]}
            plan = plan.without(moved)
            self._known = _Known(self._manifest.digest, before, plan, lay_out(plan, self._manifest))
        elif proof is not None and known is not None and self._manifest is not None:
            wrong = proof.finish()
            if wrong:
                for name, why in wrong.items():
                    logger.warning("weightsync: %s stays with the loader: %s", name, why)
                known.plan = known.plan.without(wrong)
                known.moves = lay_out(known.plan, self._manifest)
            known.proved = True
        if self._phase in ("record", "prove"):
            self._tell()
        self._targets, self._order = {}, {}

    def facts(self) -> ReplayFacts:
        """For whoever asks."""
        known = self._known
        if known is None:
            return ReplayFacts(phase=self._phase, note=self._note)
        sizes = {name: place.dtype.itemsize * torch.Size(place.shape).numel() for name, place in known.places.items()}
        why: dict[str, list[str]] = {}
        for name, reason in known.plan.by_loader.items():
            why.setdefault(reason, []).append(name)
        return ReplayFacts(
            phase=self._phase,
            targets=len(known.plan.targets),
            nbytes=sum(sizes[name] for name in known.plan.targets),
            loader_targets=len(known.plan.by_loader),
            loader_nbytes=sum(sizes.get(name, 0) for name in known.plan.by_loader),
            moves=known.moves.count,
            why={reason: _first(names) for reason, names in why.items()},
            note=self._note,
            seconds={phase: round(seconds, 6) for phase, seconds in self._seconds.items()},
        )

    def _tell(self) -> None:
        facts = self.facts()
        will = "is proved: from the next push on it loads" if facts.phase == "prove" else "is recorded, to be proved: it would load"
        logger.info(
            "weightsync: replay %s %d parameters (%.1f MB) in %d moves; %d stay with the loader%s",
            will,
            facts.targets,
            facts.nbytes / 1e6,
            facts.moves,
            facts.loader_targets,
            "".join(f"; {', '.join(names)}: {why}" for why, names in facts.why.items()),
        )

    def _replay(self, bucket: ReadBucket) -> list[Named]:
        """Carry out what the plan knows of a bucket; what is left for the loader."""
        assert self._known is not None, "`begin` comes first"
        if not self._filled:
            index = {name: i for i, name in enumerate(self._known.moves.targets)}
            for fill in self._known.plan.fills:
                strided_view(self._order[index[fill.target]], fill.box).fill_(fill.value)
            self._filled = True
        here = self._known.moves.buckets[bucket.index]
        apply(here.moves, bucket.data, self._order)
        for tensor, moves in here.cut:
            apply(moves, raw_bytes(bucket.whole(tensor)), self._order)
        return bucket.tensors(here.replayed) if here.left else []

    def _new_proof(self, known: _Known) -> Proof:
        return Proof(known.plan, known.moves, self._targets)

    def _try_proof(self, proof: Proof, bucket: ReadBucket) -> None:
        """A proof that has no memory to go on is put off: the push itself does not need it."""
        try:
            proof.bucket(bucket.index, bucket.data, bucket.whole)
        except torch.OutOfMemoryError as error:
            logger.warning("weightsync: replay is not proved, for want of memory: %s", error)
            self._proof, self._note = None, "no memory was left for the proof"


def _places(targets: Mapping[str, torch.Tensor]) -> dict[str, _Place]:
    return {
        name: _Place(t.data_ptr(), tuple(t.shape), t.stride(), t.dtype)
        for name, t in targets.items()
        if t.device.type != "meta"
    }


def _why_anew(known: _Known, manifest: Manifest, places: Mapping[str, _Place]) -> str:
    """Why a plan is of no use now; "" if it is."""
    if known.digest != manifest.digest:
        return "what is pushed has another layout"
    changed = [name for name in {**known.places, **places} if known.places.get(name) != places.get(name)]
    if not changed:
        return ""
    was, now = known.places.get(changed[0]), places.get(changed[0])
    moved = was is not None and now is not None and was[1:] == now[1:]
    more = f" and {len(changed) - 1} more have" if len(changed) > 1 else " has"
    return f"{changed[0]}{more} {'moved' if moved else 'changed'} in memory"


def _first(names: list[str]) -> list[str]:
    more = len(names) - _NAMES_TOLD
    return names if more <= 0 else [*names[:_NAMES_TOLD], f"… and {more} more"]
