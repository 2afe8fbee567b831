"""How a worker gets weights without slots: it draws them, or bridges write them into places that it shows.

direct = Direct(gpu)
direct.begin(deadline=...)
why_not = direct.draw(exposures, wants, manifest, deadline=...)     or  shown = direct.places(wants, manifest)
direct.finish()          True: nothing else is needed
direct.give_up()         instead of `finish`, if buckets come after all
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsync.drawing.drawer import Drawer
from weightsync.drawing.places import Places

if TYPE_CHECKING:
    from weightsync.plan.draws import Wants
    from weightsync.plan.exposure import Exposure, Exposures
    from weightsync.plan.manifest import Manifest

__all__ = ["Direct"]


class Direct:
    """The weights that one worker gets without slots, on its GPU `gpu`, or in host memory if that is None."""

    def __init__(self, gpu: int | None) -> None:
        self._drawer, self._places = Drawer(gpu), Places(gpu)
        self._drawn = False  # all of the update was drawn out of the trainer's memory …
        self._shown: Wants | None = None  # … or others write it, into the places that were shown for these

    def begin(self, *, deadline: float) -> None:
        """Begin an update. Raises as `settle`."""
        self._drawn, self._shown = False, None
        self.settle(deadline=deadline)

    def draw(self, exposures: Exposures, wants: Wants, manifest: Manifest, *, deadline: float) -> str:
        """Draw the update, as `Drawer.draw` does."""
        self._places.release()
        self._drawn, self._shown = False, None
        why_not = self._drawer.draw(exposures, wants, manifest, deadline=deadline)
        self._drawn = not why_not
        return why_not

    def places(self, wants: Wants, manifest: Manifest) -> Exposure | str:
        """Return the places where others may write all that is wanted, or why they cannot."""
        self._drawer.release()
        self._drawn = False
        shown = self._places.show(wants, manifest.tensors.width)
        self._shown = None if isinstance(shown, str) else wants
        return shown

    def finish(self) -> bool:
        """End the update. Others must have written all that they were to write.

        Returns whether the update came whole without slots; it then lies in the parameters.
        """
        if self._shown is not None:
            self._places.land(self._shown)
        whole = self._drawn or self._shown is not None
        self._drawn, self._shown = False, None
        return whole

    def give_up(self) -> None:
        """Fall back to buckets: unmap the trainer's memory, and disregard all that others have written."""
        self._drawn, self._shown = False, None
        self._drawer.release()
        self._places.release()

    def settle(self, *, deadline: float) -> None:
        """Wait until no copy that `draw` has queued is under way. Raises `TransportTimeout`."""
        self._drawer.settle(deadline=deadline)
