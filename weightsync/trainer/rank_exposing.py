"""Exposes one rank's weights in one push, and tells the daemon of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from weightsync.errors import ConfigError, WeightSyncError
from weightsync.plan.packing import DIGEST_BYTES
from weightsync.trainer.rank_memory import memory
from weightsync.wire import messages as msg

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from weightsync.exposing.base import Exposing
    from weightsync.exposing.device import DeviceExposed
    from weightsync.exposing.host import HostExposed
    from weightsync.filling.local import LocalWeights
    from weightsync.filling.program import Program
    from weightsync.sources.base import Source

__all__ = ["RankExposing"]


class RankExposing:
    """One rank's exposing in one push. It begins when the plan is known; `advance` goes on and tells the daemon."""

    def __init__(
        self,
        source: Source,
        program: Program,
        key: bytes,
        *,
        local: LocalWeights | None,
        ready: Sequence[Any],
        on_gpus: bool,
        endpoint: str,
        tell: Callable[[msg.Message], None],
    ) -> None:
        """`key` is the program's. `local` says where the weights lie, if this process uses GPUs. `ready` are events
        past the kernels that compute them. `on_gpus`: the node's slots, and so its engines, are on GPUs.
        """
        self._program, self._key, self._tell = program, key, tell
        self._told_as = endpoint, key[-DIGEST_BYTES:]
        self._told = False  # the daemon knows where the weights lie
        self.busy = True  # the daemon has not been told everything
        self._exposed: HostExposed | DeviceExposed | None = None
        self._exposing: Exposing | None = None
        try:
            if local is None or all(gpu < 0 for gpu in local.gpus):
                self._exposing = self._in_host_memory(source, on_gpus=on_gpus)
            else:
                self._exposing = self._on_a_gpu(source, local, ready, on_gpus=on_gpus)
        except WeightSyncError as error:  # all weights go through slots instead
            self._give_up()
            tell(msg.Exposed(problem=str(error)))
            self.busy = False

    def advance(self) -> None:
        """Go on, and tell the daemon of the exposure and the fingerprints once known. Raises as `Exposing.advance`."""
        exposing = self._exposing
        if exposing is None or not self.busy:
            return
        exposing.advance()
        if exposing.ready and not self._told:
            self._told = True
            digest = exposing.exposure.digest
            known = memory().exposed_to.get(self._told_as) == digest
            memory().exposed_to[self._told_as] = digest
            self._tell(msg.Exposed(digest=digest, exposure=None if known else exposing.exposure.packed))
        sums = exposing.measured
        if self._told and sums is not None:
            self.busy = False
            self._tell(
                msg.Measured(
                    nbytes=self._program.nbytes,
                    tensors=np.fromiter(sums.keys(), dtype="<u4", count=len(sums)).tobytes(),
                    fingerprints=np.fromiter(sums.values(), dtype="<u8", count=len(sums)).tobytes(),
                )
            )

    def tell_all(self) -> None:
        """Send the exposure in full, because the daemon does not know its digest."""
        if self._exposing is not None:
            exposure = self._exposing.exposure
            self._tell(msg.Exposed(digest=exposure.digest, exposure=exposure.packed))

    def close(self, *, deadline: float) -> None:
        """Wait for the work under way, and keep the exposed memory for the next push. Raises as `Exposing.close`."""
        self.busy = False
        if self._exposing is not None:
            self._exposing.close(deadline=deadline)
        if self._exposed is not None:
            memory().give_exposed(self._key, self._exposed)
            self._exposed = None

    def _in_host_memory(self, source: Source, *, on_gpus: bool) -> Exposing:
        from weightsync.exposing.host import HostExposed, HostExposing

        self._check(on_gpus, "host memory", "GPUs")
        known = self._exposed = memory().take_exposed(self._key)
        if not isinstance(known, HostExposed):
            self._give_up()
            known = self._exposed = HostExposed(self._program)
        return HostExposing(source, known)

    def _on_a_gpu(self, source: Source, local: LocalWeights, ready: Sequence[Any], *, on_gpus: bool) -> Exposing:
        from weightsync.exposing.device import DeviceExposed, DeviceExposing
        from weightsync.filling.device import rank_device

        self._check(not on_gpus, "a GPU", "host memory")
        gpu = rank_device(local)
        known = self._exposed = memory().take_exposed(self._key)
        if not isinstance(known, DeviceExposed) or not known.fits(local, gpu):
            self._give_up()  # there may be no room for the old copy and the new one together
            known = self._exposed = DeviceExposed(self._program, local, gpu)
        known.update(local)
        return DeviceExposing(source, known, ready)

    def _check(self, elsewhere: bool, here: str, there: str) -> None:
        if elsewhere and self._program.buckets:
            raise ConfigError(f"weights in {here} are not read in place by engines whose weights are in {there}")

    def _give_up(self) -> None:
        """Free the copies that this push and earlier ones have made."""
        memory().forget_exposed(self._key)
        if self._exposed is not None:
            self._exposed.close()
            self._exposed = None
