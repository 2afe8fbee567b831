"""Following: this node's part in a push that another daemon coordinates, one push at a time.

The coordinator's messages arrive here. It holds this node from its claim, its first instruction, or the first call of
one of its trainer's ranks here. The hold ends when the coordinator releases the push, goes on to another one, comes
back under another connection, or falls silent. Then work that it left under way is stopped, engines that it only
paused are resumed, and engines that it has touched stay paused.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from weightsync.errors import CodecError, RemoteProtocolError
from weightsync.plan.manifest import Manifest
from weightsync.session import events as ev
from weightsync.session import instructions as do
from weightsync.wire import messages as msg
from weightsync.wire.codec import plain, structured
from weightsyncd.branch import Branch
from weightsyncd.context import PushContext
from weightsyncd.follower_rails import FollowerRails
from weightsyncd.held_push import Working
from weightsyncd.hold import Hold
from weightsyncd.joining import Joining
from weightsyncd.peers import INSTRUCTIONS, MANIFEST_UNKNOWN
from weightsyncd.remote_calls import RemoteCalls

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from weightsync.config import NodeConfig
    from weightsync.errors import ErrorRecord, WeightSyncError
    from weightsyncd.bridges import Bridge
    from weightsyncd.executor import NodeExecutor
    from weightsyncd.follower_rails import AtRail
    from weightsyncd.hold import Leading
    from weightsyncd.joining import Takers

__all__ = ["Follower"]

_MANIFESTS = 16  # kept: as many as a coordinator keeps plans
_GROUPS = 64  # trainers that are remembered to have had ranks here
_TURNED_AWAY = 1024  # who is told when this node is free


class Follower:
    """See the module. `leading` is this node's own trainers (`Trainers`), which set it."""

    leading: Leading

    def __init__(
        self,
        config: NodeConfig,
        incarnation: str,
        executor: NodeExecutor,
        bridges: Sequence[Bridge],
        peers: Collection[str],
        *,
        rails: Takers,
        send: Callable[[bytes, msg.Message], bool],
        on_free: Callable[[], None],
    ) -> None:
        """`peers` are the nodes that this one pushes to. `rails` hear of a coordinator that takes a bridge for its own
        communicator. `on_free` is called when the node is let go, and when ranks that wait here may take part in a
        push.
        """
        self._config = config
        self._incarnation = incarnation
        self._executor = executor
        self._bridges = bridges
        self._peers = peers
        self._send = send
        self._on_free = on_free
        self.calls = RemoteCalls()
        self._hold = Hold(config, executor, bridges, self.calls, lambda: self.leading, on_free)
        self._joining = Joining(config, bridges, rails)
        self._own_rails = FollowerRails(config, executor, bridges)
        self._attached = -float("inf")  # when a node last attached
        self._nodes: OrderedDict[bytes, str] = OrderedDict()  # identity → the node that attached by it
        self._turned_away: dict[bytes, None] = {}  # connections that have claimed this node in vain, in order
        self._groups: OrderedDict[str, None] = OrderedDict()  # trainers that have had ranks here
        self._manifests: OrderedDict[bytes, Manifest] = OrderedDict()

    @property
    def following(self) -> str | None:
        """The name of the push elsewhere that holds this node, if one does."""
        return self._hold.held.context.push if self._hold.held is not None else None

    @property
    def context(self) -> PushContext | None:
        """What is known of that push."""
        return self._hold.held.context if self._hold.held is not None else None

    @property
    def holder(self) -> msg.Holder | None:
        """That push, as other nodes are told of it."""
        return self._hold.held.holder() if self._hold.held is not None else None

    @property
    def known(self) -> bool:
        """Whether another node has this one as a peer: such nodes attach again and again."""
        return time.monotonic() - self._attached < self._config.timeouts.liveness

    # --- this node's ranks in pushes that are coordinated elsewhere -----------------------------------------------

    @property
    def branch(self) -> Branch | None:
        """This node's ranks in the push that holds it, if any take part."""
        return self._hold.held.branch if self._hold.held is not None else None

    def branch_for(self, rank: bytes, message: msg.Open) -> Branch | None:
        """Return the branch that a rank that calls now belongs to.

        Returns None if no node has called for its trainer's ranks, or this node is not free for that push yet.
        """
        found = self.calls.get(message.group)
        if found is None or self.leading.busy or self._hold.stopping:
            return None
        identity, call = found
        held = self._hold.held
        if held is None:
            if not self._send(identity, msg.Heartbeat()):  # that connection is gone, and with it the coordinator
                self.calls.drop(identity)
                return None
            held = self._hold.take(identity, PushContext(call.push, call.model, call.version), self._node(identity))
        if held.identity != identity or held.context.push != call.push or held.end is not None:
            return None
        if held.branch is None:
            held.branch = Branch(
                self._config.node.name,
                call,
                self._bridges,
                send=self._send,
                forward=lambda message: self._send(identity, message),
            )
            held.begun = True
            self._groups[call.group] = None
            self._groups.move_to_end(call.group)
            while len(self._groups) > _GROUPS:
                self._groups.popitem(last=False)
        return held.branch if held.branch.takes(rank, message) else None

    def gather(self, identity: bytes, message: msg.Gather) -> None:
        """Note that a coordinator calls for a trainer's ranks."""
        self.calls.add(identity, message)
        self._on_free()

    def bridge_lost(self, error: WeightSyncError) -> None:
        """Note that a bridge of this node has ended."""
        if (branch := self.branch) is not None:
            branch.bridge_lost(error)

    def tell(self, identity: bytes, message: msg.TellRank) -> None:
        """Pass a message of the coordinator on to a rank of this node. Raises `CodecError`."""
        held = self._hold.of(identity, message.push)
        if held is not None and held.branch is not None:
            held.branch.tell(message)

    # --- what a coordinator says ----------------------------------------------------------------------------------

    def heard(self, identity: bytes) -> None:
        """Note that a connection is alive."""
        if (held := self._hold.held) is not None and held.identity == identity:
            held.heard = time.monotonic()

    async def attach(self, identity: bytes, message: msg.Attach) -> msg.Attached:
        """Answer with what this node offers. A coordinator that attaches anew has lost what it was doing."""
        self.heard(identity)
        self._attached = time.monotonic()
        for other in [i for i, node in self._nodes.items() if node == message.node and i != identity]:
            self.calls.drop(other)
        self._nodes[identity] = message.node
        while len(self._nodes) > 1024:
            self._nodes.popitem(last=False)
        held = self._hold.held
        if held is not None and held.identity != identity and self._nodes.get(held.identity) == message.node:
            await self._hold.let_go(held, f"node {message.node} came back")
        if message.claim is None:
            holder, claimed = self.holder or self.leading.holder(""), False
        else:
            holder = await self._claim(identity, message.node, message.claim)
            claimed = self.following == message.claim.push
        return msg.Attached(
            node=self._config.node.name,
            incarnation=f"{self._incarnation}:{':'.join(b.incarnation or '-' for b in self._bridges)}",
            engines=tuple(e.status(self._config.node.name) for e in self._executor.engines),
            slots=tuple(self._config.arena.slots for _ in self._bridges),
            slot_bytes=self._config.arena.slot_bytes,
            address=self._config.cluster.address,
            peers=tuple(sorted(self._peers)),
            device="cuda" if self._config.arena.device == "cuda" else "cpu",
            gpus=tuple(self._config.node.gpus),
            holder=holder,
            claimed=claimed,
        )

    async def _claim(self, identity: bytes, node: str, claim: msg.Claim) -> msg.Holder | None:
        """Hold this node for a push that `node` is about to lead, if the push concerns it and nothing is in the way.

        Returns what is in the way.
        """
        if self._hold.stopping or not self._concerned(claim):
            return None
        held = self._hold.held
        if held is not None and held.identity == identity and held.context.push != claim.push:
            end = self._hold.letting_go(held, "its coordinator has gone on")
            await asyncio.wait([end], timeout=self._config.timeouts.liveness / 5)
            held = self._hold.held
        if held is not None:
            holder = held.holder() if self._hold.of(identity, claim.push) is None else None
        else:
            holder = self.leading.holder(node)
            if holder is None and (identity, claim.push) not in self._hold.released:
                held = self._hold.take(identity, PushContext(claim.push, claim.model, claim.version), node)
                held.claim, held.begun = claim, False
        if holder is not None and len(self._turned_away) < _TURNED_AWAY:
            self._turned_away[identity] = None
        return holder

    def _concerned(self, claim: msg.Claim) -> bool:
        """Whether engines or ranks of this node take part in the push."""
        engines = self._executor.engines.of_model(claim.model)
        asked = [name for name in engines if not claim.engines or name in claim.engines]
        return bool(asked) or claim.group in self._groups or self.leading.awaits(claim.group)

    def tell_free(self) -> None:
        """Tell nodes that have claimed this one in vain that they may try again."""
        turned_away, self._turned_away = self._turned_away, {}
        for identity in turned_away:
            self._send(identity, msg.Free())

    async def execute(self, identity: bytes, message: msg.Execute) -> msg.Message:
        """Carry out one instruction. Raises `CodecError`, `RemoteProtocolError` or `PushRefused`."""
        kind = INSTRUCTIONS.get(str(message.instruction.get("type")))
        if kind is None:
            raise CodecError(f"no instruction is called {message.instruction.get('type')!r}")
        instruction = structured({**message.instruction, "deadline": self._until(message.timeout)}, kind)
        self._check_slots(instruction)
        if self.leading.busy:
            await self.leading.wind_up(instruction.deadline)
        held = await self._hold.work(identity, message.push, self._node(identity), message.model, message.version)
        context = held.context
        context.model, context.version = message.model, message.version  # unknown until now if a bridge was asked first
        if message.manifest is not None:
            manifest = Manifest.unpack(message.manifest)
            self._manifests[manifest.digest] = manifest
            while len(self._manifests) > _MANIFESTS:
                self._manifests.popitem(last=False)
        if message.plan is not None:
            if message.plan not in self._manifests:
                raise RemoteProtocolError("the manifest of this digest is not known here", phase=MANIFEST_UNKNOWN)
            self._manifests.move_to_end(message.plan)
            context.manifest = self._manifests[message.plan]
        if message.fingerprints is not None:
            if len(message.fingerprints) != 8 * len(context.known_manifest().tensors):
                raise RemoteProtocolError("fingerprints and manifest differ in length")
            context.expected = np.frombuffer(message.fingerprints, dtype="<u8")
        with Working(held):
            event = await self._executor.execute(context, instruction)
        shown = context.shown.get(event.engine) if isinstance(event, ev.PlacesShown) else None
        told = shown is None or shown.digest == message.places
        return msg.Executed(
            event=plain(event) if event is not None else {}, places=None if shown is None or told else shown.pack()
        )

    async def at_rail(self, identity: bytes, message: AtRail) -> msg.Message:
        """Have a bridge do what the coordinator asks."""
        self._own_rails.check(message)
        if isinstance(message, msg.JoinRail):
            await self._join(identity, message, self._until(message.timeout))
        else:
            held = await self._hold.work(identity, message.push, self._node(identity))
            # a delivery moves the whole model, so it has more time than a bucket
            manifest = held.context.manifest if isinstance(message, msg.Collect) else None
            until = self._until(message.timeout, manifest.nbytes if manifest is not None else 0)
            with Working(held, None if isinstance(message, msg.Prepare) else message.rail):  # preparing uses no wire
                await self._own_rails.do(held, message, until)
        return msg.Executed(event={})

    async def _join(self, identity: bytes, message: msg.JoinRail, until: float) -> None:
        if self.leading.busy:
            await self.leading.wind_up(until)
        if (held := self._hold.held) is not None and held.end is not None:
            await self._hold.let_go(held, None)  # its `Leave` must not come after our `Join`
        node = self._node(identity)
        await self._joining.join(node, message, lambda: self._hold.check_free(identity), until=until)
        if (held := self._hold.held) is not None:  # work in the last communicator is over
            held.rails = {(rail, task) for rail, task in held.rails if rail != message.rail}

    async def release(self, identity: bytes, push: str, error: ErrorRecord | None) -> None:
        """Let go of a push that its coordinator has ended, with an error if it failed."""
        self._hold.released.append((identity, push))
        held = self._hold.of(identity, push)
        called = held.branch.ranks if held is not None and held.branch is not None else ()
        for call in self.calls.drop(identity, push):
            if error is not None:
                self.leading.missed(call, called, error)
                self._on_free()
        if held is not None:
            await self._hold.let_go(held, None, error)

    # --- holding and letting go -----------------------------------------------------------------------------------

    def check(self, liveness: float) -> None:
        """Begin to let go of a push whose coordinator has fallen silent. Call it regularly."""
        held = self._hold.held
        if held is not None and time.monotonic() - held.heard > liveness:
            self._hold.letting_go(held, f"its coordinator has not been heard for {liveness:g} s")

    async def finish(self, until: float) -> None:
        """See `Hold.finish`."""
        await self._hold.finish(until)

    def _node(self, identity: bytes) -> str:
        """Return the node that attached by this connection; "" if none has."""
        return self._nodes.get(identity, "")

    # --- what may be asked ------------------------------------------------------------------------------------------

    def _until(self, timeout: float, nbytes: int = 0) -> float:
        """Return the deadline of work that another node asks for; this node's own config limits it."""
        return time.monotonic() + min(timeout, self._config.timeouts.operation + nbytes / do.SLOWEST)

    def _check_slots(self, instruction: do.Instruction) -> None:
        match instruction:
            case do.ExportBucket(slot=slot):
                self._own_rails.check_slot(slot)
            case do.RetireBridge(bridge=bridge):
                self._own_rails.check_slot(do.Slot(self._config.node.name, bridge, 0))
            case _ if not hasattr(instruction, "engine"):
                raise RemoteProtocolError(f"a follower does not carry out {type(instruction).__name__}")
