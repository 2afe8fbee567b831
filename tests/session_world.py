"""A small world around a `PushSession`: carries out its instructions by the book, or not, and watches the promises."""

from __future__ import annotations

from dataclasses import dataclass, field

from weightsync.errors import ErrorRecord
from weightsync.session import events as ev
from weightsync.session import instructions as do
from weightsync.session.machine import PushSession

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
    serving: bool = True


class World:
    """Holds a session, the instructions it has given and that have not ended, and what engines and slots would be."""

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
    ) -> None:
        self.engines = engines if engines is not None else {"a": "home", "b": "home"}
        nodes = {"home", *self.engines.values()}
        self.session = PushSession(
            model="default",
            version=2,
            world=world,
            home="home",
            engines=self.engines,
            slots={(node, owner): slots for node in nodes for owner in range(owners)},
            pause=pause,
            deadline=100.0,
            operation_timeout=10.0,
            grace=5.0,
        )
        self.now = 0.0
        self.served = served
        self.plan = tuple(
            ev.BucketPlan(100, i % owners, tuple(range(world)) if i % 2 == 0 else (i % world,)) for i in range(buckets)
        )
        self.models = {name: EngineModel() for name in self.engines}
        self.pending: list[do.Instruction] = []
        self.leases: list[tuple[int, int]] = []  # (rank, bucket) to fill
        self.slots: dict[tuple[str, int, int], int] = {}  # what lies where
        self.reading: dict[tuple[str, int], do.Slot] = {}  # (engine, bucket) → slot it may be reading
        self.exported: dict[tuple[str, int], do.Slot] = {}  # (node, bucket)
        self.evicted: set[str] = set()
        self.ended: list[do.EndPush] = []
        self.history: list[ev.Event] = []
        self._take(self.session.start(0.0))

    def hear(self, event: ev.Event) -> None:
        self.history.append(event)
        if isinstance(event, ev.EngineFailed) or (isinstance(event, ev.BucketReleased) and event.leaked):
            self.evicted.add(event.engine)
        self._take(self.session.handle(event, self.now))
        self.session.validate()

    def _take(self, instructions: list[do.Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case do.GrantLease():
                    slot = instruction.slot
                    for (engine, bucket), place in self.reading.items():
                        assert place != slot or engine in self.evicted, (
                            f"{slot} is leased while {engine} may read bucket {bucket} in it"
                        )
                    self.leases += [(rank, instruction.bucket) for rank in instruction.ranks]
                case do.EndPush():
                    self.ended.append(instruction)
                case do.RevokeBucket():
                    self.reading.pop((instruction.engine, instruction.bucket), None)
                    self.evicted.add(instruction.engine)
                case do.AnnouncePlan() | do.RetireBridge():
                    pass
                case do.ResumeEngine():
                    model = self.models[instruction.engine]
                    whole = model.finished and sorted(model.loaded) == list(range(len(self.plan)))
                    assert whole or not model.begun, f"{instruction.engine} is resumed with a mixture"
                    self.pending.append(instruction)
                case do.LoadBucket():
                    node = self.engines[instruction.engine]
                    self.reading[instruction.engine, instruction.bucket] = self.exported[node, instruction.bucket]
                    self.pending.append(instruction)
                case _:
                    self.pending.append(instruction)

    def succeed(self, instruction: do.Instruction) -> None:
        """The instruction ends well."""
        self.pending.remove(instruction)
        event = self._success(instruction)
        if event is not None:
            self.hear(event)

    def _success(self, instruction: do.Instruction) -> ev.Event | None:
        match instruction:
            case do.ProbeEngine(engine=name):
                return ev.EngineProbed(engine=name, tp_size=1, version=self.served, paused=False, torn=False)
            case do.AskLayout(rank=rank):
                return ev.LayoutReceived(rank=rank)
            case do.MakePlan():
                return ev.PlanMade(buckets=self.plan)
            case do.FormGroup(nodes=nodes):
                return ev.GroupFormed(nodes=nodes)
            case do.AcceptEngine(engine=name):
                return ev.EngineAccepted(engine=name)
            case do.PauseEngine(engine=name):
                self.models[name].serving = False
                return ev.EnginePaused(engine=name)
            case do.BeginEngine(engine=name):
                self.models[name].begun = True
                return ev.EngineBegun(engine=name)
            case do.ExportBucket(bucket=bucket, slot=slot):
                self.exported[slot.node, bucket] = slot
                return ev.BucketExported(bucket=bucket, node=slot.node)
            case do.RelayBucket(bucket=bucket, targets=targets):
                return ev.BucketRelayed(bucket=bucket, nodes=tuple(t.node for t in targets))
            case do.LoadBucket(engine=name, bucket=bucket):
                self.models[name].loaded.append(bucket)
                return ev.BucketLoaded(engine=name, bucket=bucket)
            case do.AwaitRelease(engine=name, bucket=bucket):
                self.reading.pop((name, bucket), None)
                return ev.BucketReleased(engine=name, bucket=bucket)
            case do.FinishEngine(engine=name):
                self.models[name].finished = True
                return ev.EngineFinished(engine=name)
            case do.VerifyEngine(engine=name):
                return ev.EngineVerified(engine=name, checked=3)
            case do.ResumeEngine(engine=name):
                self.models[name].serving = True
                return ev.EngineResumed(engine=name)
        raise AssertionError(f"unknown instruction {instruction}")

    def fail(self, instruction: do.Instruction, *, lost: bool = False, error: ErrorRecord = ERROR) -> None:
        """The instruction ends badly."""
        self.pending.remove(instruction)
        names = {
            do.ProbeEngine: "probe", do.AcceptEngine: "accept", do.PauseEngine: "pause", do.BeginEngine: "begin",
            do.LoadBucket: "load", do.FinishEngine: "finish", do.VerifyEngine: "verify", do.ResumeEngine: "resume",
        }  # fmt: skip
        match instruction:
            case do.MakePlan():
                self.hear(ev.PlanFailed(error=ERROR))
            case do.FormGroup(nodes=nodes):
                self.hear(ev.GroupFormed(nodes=(), failed=tuple((n, ERROR) for n in nodes)))
            case do.ExportBucket(slot=slot) | do.RelayBucket(slot=slot):
                self.hear(ev.BridgeLost(node=slot.node, bridge=slot.bridge, error=ERROR))
            case do.AwaitRelease(engine=name, bucket=bucket):
                self.reading.pop((name, bucket), None)
                self.hear(ev.BucketReleased(engine=name, bucket=bucket, leaked=True))
            case do.AskLayout(rank=rank):
                self.hear(ev.RankFailed(rank=rank, error=ERROR))
            case _:
                name = getattr(instruction, "engine", "")
                phase = names[type(instruction)]
                self.hear(ev.EngineFailed(engine=name, phase=phase, error=error, lost=lost))

    def open_all(self) -> None:
        for rank in range(self.session.world):
            self.hear(ev.RankOpened(rank=rank, layout=layout_of(rank)))

    def fill(self, rank: int, bucket: int) -> None:
        self.leases.remove((rank, bucket))
        self.hear(ev.RankFilled(rank=rank, bucket=bucket, nbytes=100))

    def run(self, steps: int = 10_000) -> None:
        """Everything ends well, in the order it was asked for."""
        for _ in range(steps):
            if self.pending:
                self.succeed(self.pending[0])
            elif self.leases:
                self.fill(*self.leases[0])
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
            elif self.leases:
                self.fill(*self.leases[0])
            else:
                break
        raise AssertionError(f"never asked for {kind.__name__} {fields}")
