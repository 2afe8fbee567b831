"""A small world around a `PushSession`: carries out its instructions, or fails them, and asserts its promises.

The world keeps its own account, without trusting the session: which rank may write into which slot, which reader holds
an export of it, which engine serves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from weightsync.errors import ErrorRecord
from weightsync.session import events as ev
from weightsync.session import instructions as do
from weightsync.session.machine import PushSession

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

ERROR = ErrorRecord(kind="EngineError", message="made to fail")
REFUSAL = ErrorRecord(kind="EngineRefused", message="made to refuse")


def layout_of(rank: int) -> bytes:
    return bytes([rank]) * 16


@dataclass
class EngineModel:
    """What a real engine would hold and do."""

    loaded: list[int] = field(default_factory=list)
    begun: bool = False
    finished: bool = False
    spoilt: bool = False  # drawing or a delivery wrote an unknown part of it: it has to begin anew
    serving: bool = True
    deaf: bool = False  # a pause or resume of it failed, or an outcome was lost: it may not have done as it was told

    @property
    def mixed(self) -> bool:
        return self.begun and not self.finished


class World:
    """Holds a session, its instructions that have not ended, and the states of engines and slots."""

    def __init__(
        self,
        *,
        world: int = 2,
        engines: dict[str, str] | None = None,
        buckets: int = 4,
        slots: int = 2,
        pause: str = "keep",
        served: int | None = 1,
        owners: int = 1,
        torn: str = "",
        places: tuple[str, ...] = (),
        keepers: tuple[str, ...] = (),
        draws: tuple[str, ...] = (),
        unable: tuple[str, ...] = (),
        frail: tuple[str, ...] = (),
    ) -> None:
        """`torn` names an engine that an earlier push has left torn, and so paused. `places` are the ranks' nodes;
        ranks beyond them are at home. `draws` are engines that would draw; ranks then offer their weights in place.
        Engines that are `unable` find that out when they are asked to. A delivery to a `frail` engine breaks.
        """
        self.draws, self.unable, self.frail = draws, unable, frail
        self.to_say: list[tuple[int, type[ev.Event]]] = []  # events that ranks owe about their exposed weights
        self.shown: set[int] = set()  # ranks that have exposed their weights
        self.measured: set[int] = set()
        self.placed: set[str] = set()  # engines that have shown their places
        self.drawing: set[str] = set()  # engines that may be reading exposed weights
        self.drawn: set[str] = set()
        self.delivering: dict[str, str] = {}  # engines that bridges may be delivering to, and their nodes
        self.retired: set[tuple[str, int]] = set()  # bridges
        self.released = False  # ranks may change their weights
        self.engines = engines if engines is not None else {"a": "home", "b": "home"}
        self.places = (*places, *["home"] * (world - len(places)))[:world]
        nodes = {"home", *self.engines.values(), *self.places}
        self.slots = {(node, owner): slots for node in nodes for owner in range(owners)}
        self.session = PushSession(
            model="default",
            version=2,
            world=world,
            home="home",
            engines=self.engines,
            slots=self.slots,
            pause=pause,
            deadline=100.0,
            operation_timeout=10.0,
            grace=5.0,
            last_version=None,
            keepers=keepers,
        )
        self.now = 0.0
        self.served = served
        self.plan = tuple(
            ev.BucketPlan(100, i % owners, tuple(range(world)) if i % 2 == 0 else (i % world,)) for i in range(buckets)
        )
        self.models = {name: EngineModel(serving=name != torn) for name in self.engines}
        self.torn = torn
        self.pending: list[do.Instruction] = []
        self.unheard: list[do.Instruction] = []  # never to be answered
        self.leases: list[tuple[int, int]] = []  # (rank, bucket) to fill
        self.reading: dict[tuple[str, int], do.Slot] = {}  # (engine, bucket) → slot it may be reading
        self.exported: dict[tuple[str, int], do.Slot] = {}  # (node, bucket)
        self.holds: dict[tuple[str, int], do.Slot] = {}  # (engine, bucket) → slot, by its bridge's ledger
        self.void: set[int] = set()  # exports under way, by id, from an arena that is gone by now
        self.writing: dict[tuple[int, int], do.Slot] = {}  # (rank, bucket) → slot that the rank may still write into
        self.told: dict[str, do.Instruction] = {}  # engine → its last pause or resume: it follows them in order
        self.evicted: set[str] = set()
        self.gone: set[str] = set()  # nodes that answer nothing any more
        self.ended: list[do.EndPush] = []
        self.history: list[ev.Event] = []
        self._take(self.session.start(0.0))

    def hear(self, event: ev.Event) -> None:
        self.history.append(event)
        match event:
            case (
                ev.EngineFailed(engine=name)
                | ev.BucketReleased(engine=name, leaked=True)
                | ev.BucketReleased(engine=name, damaged=True)
            ):
                self.evicted.add(name)
            case ev.BridgeLost(node=node, bridge=bridge):
                self._forget_arena(node, bridge)
            case ev.NodeLost(node=node):
                self.gone.add(node)
                for name in (n for n, where in self.engines.items() if where == node):
                    self.models[name].deaf = True  # no daemon is left that could pause it
                self.writing = {k: s for k, s in self.writing.items() if s.node != node}
                self.leases = [lease for lease in self.leases if self.places[lease[0]] != node]
                self.holds = {k: s for k, s in self.holds.items() if s.node != node}
            case ev.RankFailed(rank=rank):
                self._rank_stops(rank)
            case ev.RankStopped(rank=rank) if self.session.ended:
                self._rank_stops(rank)
        self._take(self.session.handle(event, self.now))
        self.session.validate()

    def _rank_stops(self, rank: int) -> None:
        self.writing = {k: s for k, s in self.writing.items() if k[0] != rank}
        self.leases = [lease for lease in self.leases if lease[0] != rank]

    def _forget_arena(self, node: str, bridge: int) -> None:
        """Forget the slots of a bridge: it has a new arena, and the old one does not matter any more."""

        def elsewhere(slot: do.Slot) -> bool:
            return (slot.node, slot.bridge) != (node, bridge)

        self.void |= {id(i) for i in self.pending if isinstance(i, do.ExportBucket) and not elsewhere(i.slot)}
        self.holds = {k: s for k, s in self.holds.items() if elsewhere(s)}
        self.writing = {k: s for k, s in self.writing.items() if elsewhere(s)}
        self.reading = {k: s for k, s in self.reading.items() if elsewhere(s)}

    def _take(self, instructions: list[do.Instruction]) -> None:
        for instruction in instructions:
            at_once = do.AskLayout | do.AnnouncePlan | do.GrantLease | do.ReleaseWeights | do.EndPush
            if not isinstance(instruction, at_once):
                assert instruction.deadline > self.now, f"{instruction} has no time"
            match instruction:
                case do.GrantLease():
                    slot = instruction.slot
                    assert not self.delivering, f"{slot} is leased while a bridge has another use for it"
                    assert {self.places[rank] for rank in instruction.ranks} == {slot.node}, "a rank of another node"
                    assert slot not in self.writing.values(), f"{slot} is leased while a rank may write into it"
                    exchanged = [s for i in self.pending if isinstance(i, do.ExchangeBucket) for s in i.slots]
                    assert slot not in exchanged, f"{slot} is leased while an exchange may write into it"
                    self.writing.update({(rank, instruction.bucket): slot for rank in instruction.ranks})
                    for (engine, bucket), place in self.reading.items():
                        assert place != slot or engine in self.evicted, (
                            f"{slot} is leased while {engine} may read bucket {bucket} in it"
                        )
                    self.leases += [(rank, instruction.bucket) for rank in instruction.ranks]
                case do.EndPush():
                    self.ended.append(instruction)
                case do.RevokeBucket():
                    self.reading.pop((instruction.engine, instruction.bucket), None)
                    self.holds.pop((instruction.engine, instruction.bucket), None)
                    self.evicted.add(instruction.engine)
                case do.RetireBridge():
                    self._forget_arena(instruction.node, instruction.bridge)
                    self.retired.add((instruction.node, instruction.bridge))
                case do.AnnouncePlan(expose=expose):
                    if expose:
                        assert set(self.places) == {"home"}, "a rank of another node is asked for its weights"
                        ranks = range(self.session.world)
                        self.to_say = [(r, kind) for r in ranks for kind in (ev.RankExposed, ev.RankMeasured)]
                case do.ReleaseWeights():
                    assert self.drawing <= self.evicted, f"weights may change while {self.drawing} read them"
                    assert not self.delivering, "weights may change while bridges read them"
                    self.released = True
                case do.DrawWeights(engine=name):
                    assert self.shown == set(range(self.session.world)), "weights are drawn that nobody has shown"
                    assert name in self.draws, f"{name} is to draw, and has not said that it can"
                    assert not self.released
                    self._spoil(name)
                    self.drawing.add(name)
                    self.pending.append(instruction)
                case do.ShowPlaces(engine=name):
                    assert name in self.draws, f"{name} is to show its places, and has not said that it can"
                    self.pending.append(instruction)
                case do.DeliverWeights(engines=names, nodes=nodes):
                    assert self.shown == set(range(self.session.world)), "weights are delivered that nobody has shown"
                    assert not self.released
                    assert not self.delivering
                    busy = [s for s in (*self.writing.values(), *self.holds.values()) if s.node in ("home", *nodes)]
                    assert not busy, f"{busy} are in use, and bridges need all their slots"
                    for name, node in zip(names, nodes, strict=True):
                        assert self.engines[name] == node != "home"
                        assert name in self.placed, f"{name} has not shown its places"
                        self._spoil(name)
                        self.delivering[name] = node
                    self.pending.append(instruction)
                case do.RelayBucket(targets=targets):
                    # at least one node needs it. Nodes whose engines have left stay in the communicator: another could
                    # not be formed under broadcasts that are on their way
                    there = {target.node for target in targets}
                    takers = [e for e in self.session.engines.values() if e.node in there and not e.stage.ended]
                    assert any(e.name not in self.drawn for e in takers), f"{instruction} is for nobody"
                    self.pending.append(instruction)
                case do.FinishEngine(engine=name):
                    assert not self.models[name].spoilt, f"{name} finishes with a mixture"
                    self.pending.append(instruction)
                case do.ExportBucket(slot=slot):
                    held = [key for key, place in self.holds.items() if place == slot]
                    assert not held, f"{slot} is exported while {held} hold it: the bridge refuses"
                    self.pending.append(instruction)
                case do.PauseEngine(engine=name):
                    self.told[name] = instruction
                    self.pending.append(instruction)
                case do.ResumeEngine():
                    self.told[instruction.engine] = instruction
                    model = self.models[instruction.engine]
                    whole = model.finished and sorted(model.loaded) == list(range(len(self.plan)))
                    assert whole or not model.begun, f"{instruction.engine} is resumed with a mixture"
                    self.pending.append(instruction)
                case do.VerifyEngine(engine=name) if name in self.drawn:
                    assert self.measured == set(range(self.session.world)), "there is nothing to compare with"
                    self.pending.append(instruction)
                case do.LoadBucket(bucket=first, count=count):
                    assert not self.models[instruction.engine].spoilt, f"{instruction.engine} was not begun anew"
                    node = self.engines[instruction.engine]
                    for bucket in range(first, first + count):
                        self.reading[instruction.engine, bucket] = self.exported[node, bucket]
                    self.pending.append(instruction)
                case _:
                    self.pending.append(instruction)

    def _spoil(self, name: str) -> None:
        model = self.models[name]
        assert model.begun, f"{name} is written into and was not begun"
        model.spoilt, model.loaded = True, []

    def succeed(self, instruction: do.Instruction) -> None:
        """Have an instruction succeed."""
        self.pending.remove(instruction)
        event = self._success(instruction)
        if event is not None:
            self.hear(event)

    def _success(self, instruction: do.Instruction) -> ev.Event | None:
        match instruction:
            case do.ProbeEngine(engine=name):
                torn = name == self.torn
                return ev.EngineProbed(engine=name, tp_size=1, version=self.served, paused=torn, torn=torn)
            case do.AskLayout(rank=rank):
                return ev.LayoutReceived(rank=rank)
            case do.MakePlan():
                return ev.PlanMade(buckets=self.plan)
            case do.FormRails(nodes=nodes, number=number):
                return ev.RailsFormed(nodes=nodes, number=number)
            case do.AcceptEngine(engine=name):
                return ev.EngineAccepted(engine=name, draws=name in self.draws)
            case do.PauseEngine(engine=name, mode=mode):
                if self.told[name] is instruction:
                    self.models[name].serving &= mode == "none"
                return ev.EnginePaused(engine=name)
            case do.BeginEngine(engine=name):
                model = self.models[name]
                assert not model.serving or self.session.pause == "none", f"{name} serves while it is loaded"
                model.begun, model.spoilt = True, False
                model.loaded.clear()
                return ev.EngineBegun(engine=name)
            case do.ExportBucket(bucket=bucket, slot=slot, engines=names):
                self.exported[slot.node, bucket] = slot
                if id(instruction) not in self.void and slot.node not in self.gone:  # a lost node sweeps its own slots
                    self.holds.update({(name, bucket): slot for name in names})
                return ev.BucketExported(bucket=bucket, node=slot.node)
            case do.ExchangeBucket(bucket=bucket, slots=slots):
                assert not any(b == bucket for _, b in self.writing), (
                    f"bucket {bucket} is exchanged while it is written"
                )
                assert {slot.node for slot in slots} >= {self.places[rank] for rank in self.plan[bucket].fillers}
                return ev.BucketRelayed(bucket=bucket, nodes=tuple(slot.node for slot in slots))
            case do.RelayBucket(bucket=bucket, targets=targets):
                return ev.BucketRelayed(bucket=bucket, nodes=tuple(t.node for t in targets))
            case do.LoadBucket(engine=name, bucket=first, count=count):
                self.models[name].loaded += range(first, first + count)
                return ev.BucketLoaded(engine=name, bucket=first, count=count)
            case do.DrawWeights(engine=name):
                assert not self.models[name].serving or self.session.pause == "none", f"{name} serves while it draws"
                self.drawing.discard(name)
                self.models[name].spoilt = False  # an engine that is unable has read nothing
                if name in self.unable:
                    return ev.WeightsDrawn(engine=name, drawn=False)
                self.models[name].loaded = list(range(len(self.plan)))
                self.drawn.add(name)
                return ev.WeightsDrawn(engine=name, drawn=True)
            case do.ShowPlaces(engine=name):
                if name in self.unable:
                    return ev.PlacesShown(engine=name, problem="its memory cannot be shared")
                self.placed.add(name)
                return ev.PlacesShown(engine=name)
            case do.DeliverWeights(engines=names):
                self.delivering.clear()
                if set(self.frail) & set(names):
                    return ev.WeightsDelivered(engines=names, problem="the wire broke")
                for name in names:
                    model = self.models[name]
                    assert not model.serving or self.session.pause == "none", f"{name} serves as it is loaded"
                    model.spoilt, model.loaded = False, list(range(len(self.plan)))
                    self.drawn.add(name)
                return ev.WeightsDelivered(engines=names)
            case do.AwaitRelease(engine=name, bucket=bucket):
                self.reading.pop((name, bucket), None)
                self.holds.pop((name, bucket), None)
                return ev.BucketReleased(engine=name, bucket=bucket)
            case do.FinishEngine(engine=name):
                self.models[name].finished = True
                return ev.EngineFinished(engine=name)
            case do.VerifyEngine(engine=name):
                return ev.EngineVerified(engine=name, checked=3)
            case do.ResumeEngine(engine=name):
                if self.told[name] is instruction:
                    self.models[name].serving = True
                return ev.EngineResumed(engine=name)
        raise AssertionError(f"unknown instruction {instruction}")

    def fail(self, instruction: do.Instruction, *, lost: bool = False, error: ErrorRecord = ERROR) -> None:
        """Have an instruction fail."""
        self.pending.remove(instruction)
        names = {
            do.ProbeEngine: "probe", do.AcceptEngine: "accept", do.PauseEngine: "pause", do.BeginEngine: "begin",
            do.LoadBucket: "load", do.DrawWeights: "draw", do.ShowPlaces: "show",
            do.FinishEngine: "finish", do.VerifyEngine: "verify", do.ResumeEngine: "resume",
        }  # fmt: skip
        match instruction:
            case do.MakePlan():
                self.hear(ev.PlanFailed(error=ERROR))
            case do.FormRails(nodes=nodes, number=number):
                self.hear(ev.RailsFormed(nodes=(), number=number, failed=tuple((n, ERROR) for n in nodes)))
            case do.ExchangeBucket(slots=slots):
                failed = tuple((slot.node, ERROR) for slot in slots[:1])
                self.hear(ev.BucketRelayed(bucket=instruction.bucket, nodes=(), failed=failed))
            case do.ExportBucket(slot=slot) | do.RelayBucket(slot=slot):
                self.hear(ev.BridgeLost(node=slot.node, bridge=slot.bridge, error=ERROR))
            case do.AwaitRelease(engine=name, bucket=bucket):
                self.reading.pop((name, bucket), None)
                self.holds.pop((name, bucket), None)  # the node that waited has revoked it
                self.hear(ev.BucketReleased(engine=name, bucket=bucket, leaked=not lost, damaged=lost))
            case do.DeliverWeights(engines=engines):
                self.delivering.clear()
                self.hear(ev.WeightsDelivered(engines=engines, problem="the wire broke"))
            case do.AskLayout(rank=rank):
                self.hear(ev.RankFailed(rank=rank, error=ERROR))
            case _:
                name = getattr(instruction, "engine", "")
                phase = names[type(instruction)]
                self.models[name].deaf |= lost or isinstance(instruction, do.PauseEngine | do.ResumeEngine)
                self.models[name].begun |= isinstance(instruction, do.BeginEngine)  # it may have begun
                self.hear(ev.EngineFailed(engine=name, phase=phase, error=error, lost=lost))

    def lose(self, instruction: do.Instruction) -> None:
        """Have the outcome of an instruction never come."""
        self.pending.remove(instruction)
        self.unheard.append(instruction)
        name = getattr(instruction, "engine", "")
        if name in self.models:
            self.models[name].deaf = True

    def check_done(self) -> None:
        """Assert everything that the next push may count on."""
        session = self.session
        assert not self.holds, f"slots are held after the end: {self.holds}"
        assert not self.writing, f"ranks may write after the end: {self.writing}"
        places = [place for place in self.slots if place[0] in ("home", *self.delivering.values())]
        assert not self.delivering or self.retired.issuperset(places), "a delivery may still write into slots"
        unanswered = {getattr(instruction, "engine", "") for instruction in self.pending}
        for name, model in self.models.items():
            track = session.engines[name]
            if model.deaf or name in unanswered or str(track.stage) == "lost":
                continue
            if str(track.stage) == "committed":
                assert model.serving, f"{name} is committed, and does not serve"
            elif model.mixed or name == self.torn or str(track.stage) == "torn":
                assert not model.serving, f"{name} serves a mixture, or what is not known to be none"
            elif not model.begun:
                assert model.serving, f"{name} was not touched, and does not serve"

    def open_all(self) -> None:
        for rank in range(self.session.world):
            self.open(rank)

    def open(self, rank: int) -> None:
        self.gone.discard(self.places[rank])  # a node from which a rank calls is there again
        in_place = bool(self.draws)
        self.hear(ev.RankOpened(rank=rank, layout=layout_of(rank), node=self.places[rank], in_place=in_place))

    def say(self, at: int = 0, problem: str = "") -> None:
        """Have a rank tell where its weights lie, or their fingerprints."""
        rank, kind = self.to_say.pop(at)
        if kind is ev.RankMeasured:
            self.measured.add(rank)
            self.hear(ev.RankMeasured(rank=rank, nbytes=100))
            return
        if problem:
            self.to_say = [one for one in self.to_say if one[0] != rank]
        else:
            self.shown.add(rank)
        self.hear(ev.RankExposed(rank=rank, problem=problem))

    def fill(self, rank: int, bucket: int) -> None:
        self.leases.remove((rank, bucket))
        self.writing.pop((rank, bucket), None)
        self.hear(ev.RankFilled(rank=rank, bucket=bucket, nbytes=100))

    def run_some(self, which: Callable[[do.Instruction], bool]) -> bool:
        """Fill all leases, and have the chosen instructions succeed. Returns False if there was nothing to do."""
        before = len(self.history)
        while self.to_say:
            self.say()
        while self.leases:
            self.fill(*self.leases[0])
        for instruction in [i for i in self.pending if which(i)]:
            if instruction in self.pending:
                self.succeed(instruction)
        return len(self.history) > before

    def run(self, steps: int = 10_000) -> None:
        """Have everything succeed, in the order it was asked for."""
        for _ in range(steps):
            if self.pending:
                self.succeed(self.pending[0])
            elif self.to_say:
                self.say()
            elif self.leases:
                self.fill(*self.leases[0])
            else:
                return

    def run_mixed(self, steps: int, chance: Random, hung: type[do.Instruction] | None = None) -> None:
        """Have everything succeed in random order: ranks' messages, fills, and all instructions but `hung`."""
        for _ in range(steps):
            which = chance.randrange(3)
            ready = [i for i in self.pending if hung is None or not isinstance(i, hung)]
            if ready and (which == 0 or not (self.to_say or self.leases)):
                self.succeed(chance.choice(ready))
            elif self.to_say and (which == 1 or not self.leases):
                self.say(chance.randrange(len(self.to_say)))
            elif self.leases:
                self.fill(*chance.choice(self.leases))
            else:
                return

    def run_until(self, kind: type[do.Instruction], **fields: object) -> do.Instruction:
        """Go on until an instruction of this kind is pending; it stays pending."""
        for _ in range(10_000):
            for instruction in self.pending:
                if isinstance(instruction, kind) and all(getattr(instruction, k) == v for k, v in fields.items()):
                    return instruction
            if self.pending:
                self.succeed(self.pending[0])
            elif self.to_say:
                self.say()
            elif self.leases:
                self.fill(*self.leases[0])
            else:
                break
        raise AssertionError(f"never asked for {kind.__name__} {fields}")
