"""The reading side, inside a worker: copies slices out of slots straight into the parameters.

A manifest is turned into a loading plan once, when it is accepted (`loading.py`). The plan has, for every bucket, the
boxes that this rank needs, and their places in slot and parameters. `host.py` or `device.py`, which know the memory,
then load a bucket. The comparison reads the parameters, never the slot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from weightsync.adapters.places import shown
from weightsync.adapters.reference.commands import MANIFESTS_KEPT
from weightsync.adapters.reference.loading import plan_loading
from weightsync.drawing.direct import Direct
from weightsync.errors import LocalProtocolError, TransportBroken
from weightsync.plan.residents import ResidentBoxes

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from weightsync.adapters.places import Shown
    from weightsync.adapters.reference.config import ModelConfig
    from weightsync.adapters.reference.loading import LoadingPlan
    from weightsync.adapters.reference.sharding import RankLayout
    from weightsync.plan.boxes import Words
    from weightsync.plan.draws import Wants
    from weightsync.plan.exposure import Exposures
    from weightsync.plan.manifest import Manifest
    from weightsync.transports.base import BucketReceiver, Lease

__all__ = ["BucketLoader", "Parameters"]


class Parameters(Protocol):
    """A rank's parameters in one kind of memory, and how boxes get into them."""

    def prepare(self, plan: LoadingPlan) -> Any:
        """Turn a plan into the form that the other methods take."""

    def load(self, prepared: Any, bucket: int, lease: Lease) -> None:
        """Copy this rank's boxes out of a bucket. The lease ends when they are copied, maybe after the return."""

    def wants(self, prepared: Any) -> Wants:
        """Return the boxes to draw out of a trainer's memory, and where to put them."""

    def settle(self, *, deadline: float) -> None:
        """Wait until everything is loaded. Raises what went wrong."""

    def fingerprints(self, prepared: Any) -> Words:
        """Fingerprint the parameters' residents as they are now: uint64 [residents]."""

    def close(self) -> None:
        """Wait for copies under way."""


class _Update:
    """An update under way, and the pieces that were loaded."""

    def __init__(self, manifest: Manifest, prepared: Any) -> None:
        self.manifest = manifest
        self.prepared = prepared
        self.loaded = np.zeros(manifest.pieces, dtype=np.bool_)


class BucketLoader:
    """Loads pushes into one rank's parameters. `receiver` is the reading end of a transport, closed with this loader.

    Methods that take a manifest's digest raise `LocalProtocolError` if that manifest was not accepted.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: RankLayout,
        parameters: Parameters,
        receiver: BucketReceiver,
        *,
        gpu: int | None = None,
    ) -> None:
        """`gpu` is the CUDA device number of the parameters' GPU; None: they lie in host memory."""
        self._config = config
        self._layout = layout
        self._parameters = parameters
        self._receiver = receiver
        self._direct = Direct(gpu)
        self._plans: dict[bytes, tuple[LoadingPlan, Any]] = {}
        self._update: _Update | None = None

    def accept(self, manifest: Manifest) -> None:
        """Plan the loading of a manifest, and keep the plan until `MANIFESTS_KEPT` others were accepted."""
        known = self._plans.pop(manifest.digest, None)
        if known is None:
            plan = plan_loading(self._config, self._layout, manifest)
            known = plan, self._parameters.prepare(plan)
        self._plans[manifest.digest] = known
        while len(self._plans) > MANIFESTS_KEPT:
            del self._plans[next(iter(self._plans))]

    def begin(self, digest: bytes, offers: Sequence[bytes], *, deadline: float) -> None:
        """Open an update of an accepted manifest, dropping one that is open, and attach to the arenas on offer."""
        plan, prepared = self._accepted(digest)
        self._update = None
        self._parameters.settle(deadline=deadline)
        self._direct.begin(deadline=deadline)
        for offer in offers:
            self._receiver.accept(offer, deadline=deadline)
        self._update = _Update(plan.manifest, prepared)

    def draw(self, exposures: Exposures, *, deadline: float) -> str:
        """Read the open update's tensors where a trainer's ranks expose them. Returns as `Drawer.draw`."""
        update = self._open()
        wants = self._parameters.wants(update.prepared)
        return self._direct.draw(exposures, wants, update.manifest, deadline=deadline)

    def places(self, known: Collection[bytes]) -> Shown:
        """Show where bridges may write the open update's tensors, until `finish` and instead of buckets.

        `known` are digests of places that the daemon has been shown before.
        """
        update = self._open()
        return shown(self._direct.places(self._parameters.wants(update.prepared), update.manifest), known)

    def load(self, bucket: int, ticket: bytes, *, deadline: float) -> None:
        """Copy this rank's boxes out of one bucket, maybe after the return. Each bucket of an update is loaded once."""
        update = self._open()
        self._direct.give_up()
        manifest = update.manifest
        if not 0 <= bucket < manifest.buckets:
            raise LocalProtocolError(f"the manifest has buckets 0 to {manifest.buckets - 1}", bucket=bucket)
        pieces = slice(int(manifest.bucket_first[bucket]), int(manifest.bucket_first[bucket + 1]))
        if update.loaded[pieces].any():
            raise LocalProtocolError("the bucket was loaded before", bucket=bucket)
        lease = self._receiver.receive(ticket, deadline=deadline)
        expected = int(manifest.bucket_nbytes[bucket])
        if lease.nbytes != expected:
            lease.release()
            raise TransportBroken(f"the bucket has {lease.nbytes} bytes, its manifest says {expected}", bucket=bucket)
        self._parameters.load(update.prepared, bucket, lease)
        update.loaded[pieces] = True

    def finish(self, *, deadline: float) -> None:
        """End the update. Raises `LocalProtocolError` naming the first tensor that lacks a piece."""
        update = self._open()
        if not self._direct.finish() and not update.loaded.all():
            manifest = update.manifest
            piece = int(np.argmin(update.loaded))
            name = manifest.tensors.names[int(manifest.piece_tensor[piece])]
            missing = int(update.loaded.size - np.count_nonzero(update.loaded))
            raise LocalProtocolError(
                f"tensor {name!r} was not loaded (whole); {missing} of {manifest.pieces} pieces are missing",
                bucket=int(manifest.piece_bucket[piece]),
            )
        self._parameters.settle(deadline=deadline)
        self._update = None

    def residents(self, digest: bytes) -> ResidentBoxes:
        """Return the boxes of an accepted manifest's tensors that this rank holds; the same at every call."""
        plan, _ = self._accepted(digest)
        return ResidentBoxes.of(
            [(held.tensor, held.offset, held.shape) for held in plan.residents], plan.manifest.tensors.width
        )

    def fingerprints(self, digest: bytes) -> Words:
        """Fingerprint the parameters as they are now: uint64 [n], in the order of `residents`."""
        return self._parameters.fingerprints(self._accepted(digest)[1])

    def close(self) -> None:
        """Detach from every arena."""
        self._update = None
        self._parameters.close()
        self._direct.give_up()
        self._receiver.close()

    def _open(self) -> _Update:
        if self._update is None:
            raise LocalProtocolError("no update is open", hint="begin first")
        return self._update

    def _accepted(self, digest: bytes) -> tuple[LoadingPlan, Any]:
        plan = self._plans.get(digest)
        if plan is None:
            raise LocalProtocolError(f"manifest {digest.hex()} was not accepted")
        return plan
