"""Takes one model from its loader to a proved replay, push by push.

    record    the loader loads and is watched
    prove     the loader loads again, and a replay into scratch must come to the same bits
    replay    copies only, and the loader for tensors that cannot be replayed

Each manifest goes this way separately, and again if parameters have moved (a sleep, a LoRA adapter, experts shuffled).
"""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from time import perf_counter
from typing import TYPE_CHECKING, Literal

import msgspec
import torch

from weightsync.errors import LocalProtocolError
from weightsync.plan.draws import Wants
from weightsync.plan.replay_facts import LAYOUTS, ReplayFacts
from weightsync.replay.kernel import mover_for
from weightsync.replay.known import Known
from weightsync.replay.model import ModelState
from weightsync.replay.moves import lay_out, raw_bytes, strided_view
from weightsync.replay.proof import Proof
from weightsync.replay.recorder import Recorder
from weightsync.replay.sums import sums_for

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from weightsync.plan.manifest import Manifest
    from weightsync.replay.bucket import Named, ReadBucket
    from weightsync.replay.kernel import Carry
    from weightsync.replay.residents import Residents

__all__ = ["EXPERTS_MOVE", "SWITCH", "ModelReplay", "Phase"]

logger = logging.getLogger(__name__)

EXPERTS_MOVE = "experts are given other places while the engine serves (EPLB), at the same addresses"
SWITCH = "WEIGHTSYNC_REPLAY"  # in the engine's environment; 0 leaves everything to its loader
Phase = Literal["off", "record", "prove", "replay", "loader"]


class ModelReplay:
    """The replay of one model in one worker. Not for several threads."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        switch = environment.get(SWITCH, "").strip()
        self._off = switch not in ("", "1")
        self._layouts: dict[bytes, Known] = {}  # by the manifest's digest; the one pushed longest ago comes first
        self._known: Known | None = None  # that of the last push
        self._phase: Phase = "off"
        self._note = f"{SWITCH} is {switch}" if self._off else ""
        self._manifest: Manifest | None = None
        self._before: ModelState | None = None
        self._order: dict[int, torch.Tensor] = {}  # targets, by the numbers that moves have for them
        self._carry: Carry | None = None  # carries out moves onto these
        self._recorder: Recorder | None = None
        self._proof: Proof | None = None
        self._pulled = 0
        self._device = torch.device("cpu")
        self._seconds: dict[str, float] = {}  # of the last push in each phase

    @property
    def replayed(self) -> frozenset[str]:
        """Parameters that this push loads without the loader; their layers get nothing from it."""
        if self._phase != "replay" or self._known is None:
            return frozenset()
        return frozenset(self._known.plan.targets)

    @property
    def pulled(self) -> int:
        """How many buckets of the push were pulled."""
        return self._pulled

    @property
    def whole(self) -> bool:
        """Whether this push needs no loader at all."""
        return self._phase == "replay" and self._known is not None and self._known.moves.whole

    def begin(self, manifest: Manifest, model: torch.nn.Module) -> None:
        """Begin a push of this manifest, however the last push ended. `model` is as its kernels see it."""
        self._recorder = self._proof = self._before = self._carry = None
        self._phase, self._manifest = "off", manifest
        if not self._off:
            self._learn(lambda: self._choose(manifest, model))
        self._seconds[self._phase], self._pulled = 0.0, 0

    def _choose(self, manifest: Manifest, model: torch.nn.Module) -> None:
        now = ModelState.tensors_of(model)
        targets = now.tensors
        elsewhere = {t.device for t in targets.values() if t.device.type not in ("cpu", "meta")}
        self._device = next(iter(elsewhere), torch.device("cpu"))
        if len(elsewhere) > 1:
            self.turn_off(f"its weights are on {len(elsewhere)} devices")
            return
        known = self._layouts.pop(manifest.digest, None)
        if known is not None and (anew := known.why_anew(now.places)):
            logger.info("weightsync: replay begins anew: %s", anew)
            self._note, known = anew, None
        if known is not None:
            self._layouts[manifest.digest] = known
        self._known = known
        if known is None:
            self._recorder, self._before = Recorder(targets), ModelState.of(model)
            self._phase = "record"
        elif not known.plan.targets:
            self._phase = "loader"
        else:
            self._order = {i: targets[name] for i, name in enumerate(known.moves.targets)}
            if not known.proved:
                self._proof = Proof(known.plan, known.moves, targets, known.mover)
                self._before = ModelState.of(model)
            else:
                self._carry = known.mover.onto(self._order)
                self._fill(known)  # before copies, which may run on other streams and overwrite a part of a fill
            self._phase = "replay" if known.proved else "prove"

    def turn_off(self, why: str) -> None:
        """Leave everything to the loader from here on. Others must not call this during a push."""
        self._off, self._note, self._known = True, why, None
        self._layouts.clear()

    def takes(self, bucket: int) -> bool:
        """Whether this bucket can be pulled.

        Replay must load all of it without the loader, and the residents must cover all that the plan copies.
        """
        known, manifest = self._known, self._manifest
        if self._phase != "replay" or known is None or manifest is None:
            return False
        return not known.moves.buckets[bucket].left and known.held(manifest).complete

    def pull(self, bucket: ReadBucket, share: int = 1) -> None:
        """Load a bucket without the loader. `share`: see `Carry`. Raises `LocalProtocolError` unless `takes` says so.

        The bucket's bytes are not read after this returns; on a GPU, not after the current stream's queued work.
        """
        if not self.takes(bucket.index):
            raise LocalProtocolError("a loader has to see this bucket, and would keep it", bucket=bucket.index)
        begun = perf_counter()
        self._replay(bucket, share)
        self._seconds["replay"] += perf_counter() - begun
        self._pulled += 1

    def wants(self) -> Wants | None:
        """Return what must be drawn out of the trainer's memory, or written by others, in place of all buckets.

        Returns None if that cannot be, such as when the loader has to see a part of this push.
        """
        known, manifest = self._known, self._manifest
        if not self.whole or known is None or manifest is None or not known.held(manifest).complete:
            return None
        if any(target.device != self._device for target in self._order.values()):
            return None
        if known.wanted is None:
            known.wanted = known.held(manifest).wanted(known.moves.targets)
        return Wants(known.wanted, [self._order[i].data_ptr() for i in range(len(self._order))])

    def drawn(self) -> None:
        """Note that all that `wants` returned has come, and no bucket. Call `finish` next."""
        assert self._manifest is not None, "`begin` comes first"
        self._pulled = self._manifest.buckets

    def forget(self) -> None:
        """Forget all that was learnt. Must not be called during a push."""
        self._layouts.clear()
        self._known = None

    def load(self, bucket: ReadBucket, load: Callable[[list[Named]], object]) -> None:
        """Load one bucket. `load` is called with those of its tensors that the loader must get, if there are any."""
        begun = perf_counter()
        tensors = self._replay(bucket) if self._phase == "replay" else bucket.tensors()
        if self._recorder is not None:
            for name, tensor in tensors:
                self._recorder.offer(name, tensor)
        if tensors:
            self.watched(lambda: load(tensors))
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + perf_counter() - begun
        if self._proof is not None:
            proof = self._proof
            self._learn(lambda: proof.bucket(bucket.index, bucket.data, bucket.whole))

    def watched(self, work: Callable[[], object]) -> None:
        """Do `work`, which may load weights, watched by the recorder if there is one."""
        with self._recorder or nullcontext():
            work()

    def finish(self, look: Callable[[], ModelState]) -> None:
        """End a push that is wholly loaded. `look` returns the model's state now. The next push uses what is learnt."""
        if self._recorder is not None or self._proof is not None:
            self._learn(lambda: self._conclude(look()))
        if self.whole:
            self._give_back()
        self._recorder = self._proof = self._before = self._carry = None
        self._order = {}

    def _give_back(self) -> None:
        """Free memory in torch's cache that this push did not need: torch would keep it from the engine for good.

        Earlier pushes of this layout took it for copies of buckets, a loader or a proof. Freeing takes time, so it is
        done only when a push first does without them.
        """
        assert self._known is not None, "it is replayed"
        thrift, before = 2 if self._pulled else 1, self._known.thrift
        self._known.thrift = thrift
        if thrift > before:
            torch.cuda.empty_cache()

    def _conclude(self, model: ModelState) -> None:
        recorder, proof, known, before = self._recorder, self._proof, self._known, self._before
        assert self._manifest is not None, "`begin` comes first"
        assert before is not None
        more = before.replaced(model)
        if recorder is not None:
            plan, table = recorder.plan(more), self._manifest.tensors
            sizes = dict(zip(table.names, table.sizes.tolist(), strict=True))
            moves, mover = lay_out(plan, self._manifest), mover_for(self._device)
            self._known = Known(before.places, plan, moves, mover, sizes)
            while len(self._layouts) >= LAYOUTS:
                del self._layouts[next(iter(self._layouts))]
            self._layouts[self._manifest.digest] = self._known
        elif proof is not None and known is not None:
            wrong = proof.finish() | {name: why for name, why in more.items() if name in known.plan.targets}
            for name, why in wrong.items():
                logger.warning("weightsync: %s stays with the loader: %s", name, why)
            known.plan = known.plan.without(wrong)
            known.moves, known.mover = lay_out(known.plan, self._manifest), mover_for(self._device)
            known.proved, known.counted = True, None
        self._tell()

    def _learn(self, work: Callable[[], None]) -> None:
        """Do `work`. If it fails, the push goes on, since the loader loads. Replay is then turned off, or put off if
        memory was short.
        """
        try:
            work()
        except Exception as error:
            self._recorder = self._proof = None
            if _no_memory(error):
                self._note = f"no memory was left to prove it: {error}"
                logger.warning("weightsync: replay is put off: %s", self._note)
                return
            self.turn_off(f"it failed: {type(error).__name__} {error}")
            logger.exception("weightsync: replay is off from here on")

    def facts(self) -> ReplayFacts:
        """Return what status shows of this replay."""
        known = self._known
        told = known.count() if known is not None else ReplayFacts(phase="")
        seconds = {phase: round(seconds, 6) for phase, seconds in self._seconds.items()} if known is not None else {}
        return msgspec.structs.replace(
            told, phase=self._phase, pulled=self._pulled, note=self._note, compares=not self._off, seconds=seconds
        )

    def residents(self, digest: bytes, model: ModelState) -> Residents | None:
        """Return which boxes of the last push's tensors `model` holds. `digest` is that of its manifest.

        Returns None if nothing is proved, parameters have moved, or the last push had another manifest.
        """
        known, manifest = self._known, self._manifest
        if known is None or manifest is None or not known.proved or manifest.digest != digest:
            return None
        return None if known.why_anew(model.places) else known.held(manifest)

    def fingerprints(self, residents: Residents, model: ModelState) -> bytes | None:
        """Fingerprint these residents as they lie in `model` now. On failure, returns None and turns replay off."""
        known = self._known
        assert known is not None, "there are residents of it"
        try:
            if known.sums is None:
                known.sums = sums_for(residents, self._device, model.tensors)
            return known.sums.fingerprints(model.tensors)
        except Exception as error:
            self.turn_off(f"fingerprints failed: {type(error).__name__} {error}")
            logger.exception("weightsync: replay is off from here on")
            return None

    def _tell(self) -> None:
        facts = self.facts()
        will = "is proved, and loads" if facts.phase == "prove" else "is recorded, and will load once it is proved"
        logger.info(
            "weightsync: replay %s %d tensors (%.1f MB) in %d moves; %d stay with the loader%s",
            will,
            facts.replayed,
            facts.replayed_bytes / 1e6,
            facts.moves,
            facts.by_loader,
            "".join(f"; {', '.join(names)}: {why}" for why, names in facts.why.items()),
        )

    def _fill(self, known: Known) -> None:
        index = {name: i for i, name in enumerate(known.moves.targets)}
        for fill in known.plan.fills:
            strided_view(self._order[index[fill.target]], fill.box).fill_(fill.value)

    def _replay(self, bucket: ReadBucket, share: int = 1) -> list[Named]:
        """Carry out the plan's moves of a bucket. Returns the tensors that are left for the loader."""
        carry = self._carry
        assert self._known is not None, "`begin` comes first"
        assert carry is not None
        here = self._known.moves.buckets[bucket.index]
        try:
            carry((bucket.index, -1), here.moves, bucket.data, share)
            for tensor, moves in here.cut:
                carry((bucket.index, tensor), moves, raw_bytes(bucket.whole(tensor)), 1)
        except Exception as error:  # this push fails; the next one, which repairs, must not fail in the same way
            self.turn_off(f"it failed: {type(error).__name__} {error}")
            raise
        return bucket.tensors(here.replayed) if here.left else []


def _no_memory(error: Exception) -> bool:
    """Whether an allocation failed; in host memory torch has no exception of its own for that."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)
