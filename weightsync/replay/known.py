"""What one worker has learnt about how its engine loads one manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsync.plan.replay_facts import ReplayFacts
from weightsync.replay.residents import Residents

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightsync.plan.draws import Wanted
    from weightsync.plan.manifest import Manifest
    from weightsync.replay.kernel import Mover
    from weightsync.replay.model import Place
    from weightsync.replay.moves import Moves
    from weightsync.replay.plan import LoadPlan
    from weightsync.replay.sums import Sums

__all__ = ["Known"]

_NAMES_TOLD = 4  # of parameters with the same reason


@dataclass
class Known:
    """What was learnt about one manifest."""

    places: dict[str, Place]
    plan: LoadPlan
    moves: Moves
    mover: Mover  # for these moves
    sizes: dict[str, int]  # of the tensors of the push, in bytes
    proved: bool = False
    thrift: int = 0  # of the last push that needed no loader: 1 if its buckets were copied first, 2 if not
    residents: Residents | None = None  # these four are worked out when first asked for
    sums: Sums | None = None
    wanted: tuple[Wanted, ...] | None = None
    counted: ReplayFacts | None = None

    def count(self) -> ReplayFacts:
        """Count what the plan replays. Cached: each look at the engine asks, and tensors may be tens of thousands."""
        if self.counted is None:
            plan, why = self.plan, dict[str, list[str]]()
            for name, reason in plan.loader_sources.items():
                why.setdefault(reason, []).append(name)
            self.counted = ReplayFacts(
                phase="",
                replayed=len(plan.sources),
                replayed_bytes=sum(self.sizes[name] for name in plan.sources),
                by_loader=len(plan.loader_sources),
                by_loader_bytes=sum(self.sizes[name] for name in plan.loader_sources),
                moves=self.moves.count,
                why={reason: _first(names) for reason, names in why.items()},
            )
        return self.counted

    def held(self, manifest: Manifest) -> Residents:
        """Return the residents of the plan. `manifest` is the one that was learnt."""
        if self.residents is None:
            self.residents = Residents(self.plan, manifest)
        return self.residents

    def why_anew(self, places: Mapping[str, Place]) -> str:
        """Return why this does not hold for parameters at `places`; "" if it does."""
        changed = [name for name in {**self.places, **places} if self.places.get(name) != places.get(name)]
        if not changed:
            return ""
        was, now = self.places.get(changed[0]), places.get(changed[0])
        moved = was is not None and now is not None and was[1:] == now[1:]
        more = f" and {len(changed) - 1} more have" if len(changed) > 1 else " has"
        return f"{changed[0]}{more} {'moved' if moved else 'changed'} in memory"


def _first(names: list[str]) -> list[str]:
    more = len(names) - _NAMES_TOLD
    return names if more <= 0 else [*names[:_NAMES_TOLD], f"… and {more} more"]
