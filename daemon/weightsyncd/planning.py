"""The plan of one push: made from the ranks' layouts once all arenas are there, and told to every rank."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import numpy as np

from weightsync.errors import PushRefused, WeightSyncError
from weightsync.session import events as ev
from weightsync.transports.group import ONE_SENDER
from weightsync.wire import messages as msg

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightsyncd.context import PushContext
    from weightsyncd.plans import CachedPlan
    from weightsyncd.push import Services
    from weightsyncd.ranks import Ranks

__all__ = ["Planning"]

logger = logging.getLogger(__name__)


class Planning:
    """See the module. `engines` maps the name of each engine of the push to its node."""

    def __init__(self, services: Services, context: PushContext, ranks: Ranks, engines: Mapping[str, str]) -> None:
        self.announced = False
        self._services, self._context, self._ranks, self._engines = services, context, ranks, engines
        self._home = services.config.node.name
        self._names: list[str] = []  # nodes with ranks, in the plan's order
        self._plan: CachedPlan | None = None

    async def make(self, deadline: float) -> ev.Event:
        """Make the plan, and wait for this node's arenas: a bridge may be restarting, or be wedged."""
        until = min(deadline, time.monotonic() + self._services.config.timeouts.bridge_start)
        ranks, plans = self._ranks, self._services.plans
        digests = tuple(ranks[rank].layout for rank in range(ranks.world))
        self._names = ranks.nodes()
        places = {name: index for index, name in enumerate(self._names)}
        nodes = tuple(places[ranks[rank].node] for rank in range(ranks.world))
        owners = self._owners()
        missing = plans.missing(digests, owners, nodes)
        if missing:
            return ev.LayoutsMissing(ranks=tuple(missing))
        try:
            self._plan = await plans.plan(digests, owners, nodes)
            await self._services.rails.overrule()  # engines' groups would wait for it, too
            await self._services.executor.exports.prompt(until)
        except WeightSyncError as error:
            return ev.PlanFailed(error=error.record())
        manifest = self._plan.manifest
        if not manifest.tensors.sizes.any():  # it would be the version before it under another number
            nothing = PushRefused("no rank has a tensor to push", hint="look at what `only` chooses, on every rank")
            return ev.PlanFailed(error=nothing.record())
        self._context.manifest = manifest
        self._context.expected = np.zeros(len(manifest.tensors), dtype=np.uint64)
        self._context.measured = np.zeros(len(manifest.tensors), dtype=np.uint64)
        return ev.PlanMade(buckets=self._plan.buckets)

    def announce(self, *, expose: bool) -> None:
        """Tell every rank the plan, unless it knows it, and the arenas of its node."""
        plan = self._made()
        offers = tuple(bridge.offer for bridge in self._services.executor.exports.bridges)
        self.announced = None not in offers
        if not self.announced:
            return  # a bridge has just ended: `BridgeLost` is on its way to the session
        for rank in self._ranks:
            known = self._ranks[rank]
            has_it = known.call.plan == plan.digest
            here = known.node == self._home  # a rank elsewhere gets offers of its own node's arenas, from its daemon
            self._ranks.tell(
                rank,
                msg.Planned(
                    plan=plan.digest,
                    offers=tuple(offer for offer in offers if offer is not None and here),
                    manifest=None if has_it else plan.manifest.pack(),
                    fills=None if has_it else plan.fills[rank],
                    expose=expose,
                ),
            )

    def runs(self, bucket: int) -> dict[str, bytes]:
        """Return, by node, the runs of a bucket that its ranks write, if ranks of several nodes do."""
        return {self._names[share.node]: share.runs for share in self._made().shares[bucket]}

    def _made(self) -> CachedPlan:
        assert self._plan is not None, "PlanMade comes first"
        return self._plan

    def _owners(self) -> int:
        """Return how many bridges of each node get buckets: one, if an engine of this node takes them from one only."""
        engines = self._services.executor.engines
        here = [engines[name] for name, node in self._engines.items() if node == self._home and name in engines]
        owners = self._services.rails.count(sorted({*self._names, *self._engines.values()} - {self._home}))
        alone = [e.name for e in here if e.info is not None and e.info.transport in ONE_SENDER and e.state != "lost"]
        if alone and owners > 1:
            words = (self._context.model, self._context.version, alone[0], owners)
            logger.info("[model=%s v=%d engine=%s] takes weights from one bridge, and so all do, of %d", *words)
            return 1
        return owners
