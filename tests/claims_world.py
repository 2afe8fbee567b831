"""Several nodes that lead pushes and follow them, without processes: real trainers, claims, peers and followers.

Messages between nodes take some time. The clock jumps to the next event whenever nothing else is to be done.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from random import Random
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.wire_examples import EXAMPLES
from weightsync.config import parse_node_config
from weightsync.errors import DaemonError, DaemonLost, ErrorRecord, PushAborted, PushRefused
from weightsync.wire import messages as msg
from weightsyncd import peers, trainers
from weightsyncd.follower import Follower
from weightsyncd.metrics import Metrics
from weightsyncd.peers import Peer
from weightsyncd.ranks import Rank, Ranks
from weightsyncd.trainers import Trainers

__all__ = ["World"]

(OPEN,) = [example for example in EXAMPLES if isinstance(example, msg.Open)]


class Clock(asyncio.SelectorEventLoop):
    """A loop in which it is the time of whatever comes next."""

    now = 1000.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        inner: Any = self
        if not inner._ready and inner._scheduled:
            self.now = max(self.now, inner._scheduled[0]._when)
        super()._run_once()  # type: ignore[misc]


class Link:
    """As a `PeerLink`, to another node of the world."""

    def __init__(self, world: World, endpoint: str, on_news: Any) -> None:
        self.world, self.far, self._on_news = world, world.nodes[endpoint], on_news
        self.identity = b"link%d" % next(world.numbers)
        world.links[self.identity] = self
        self.near = ""
        self.heard, self.broken = time.monotonic(), asyncio.Event()
        self._waiting: dict[int, asyncio.Future[msg.Message]] = {}
        self._ids, self._there, self._back = itertools.count(1), 0.0, 0.0

    @property
    def silent(self) -> bool:
        return time.monotonic() - self.heard > self.world.liveness

    def _cut(self) -> bool:
        return bool({self.near, self.far.name} & self.world.silent)

    def tell(self, message: msg.Message) -> None:
        if isinstance(message, msg.Attach):
            self.near = message.node
            self.world.claims += message.claim is not None
        if not self._cut():
            self._there = max(self._there + 1e-9, self.world.later())
            asyncio.get_running_loop().call_at(self._there, self.far.arrives, self.identity, message)

    async def ask(self, message: msg.Message, *, deadline: float) -> msg.Message:
        number = next(self._ids)
        self._waiting[number] = waiting = asyncio.get_running_loop().create_future()
        self.tell(msgspec.structs.replace(message, id=number))
        try:
            async with asyncio.timeout_at(deadline):
                answer: msg.Message = await waiting
                return answer
        except TimeoutError:
            raise DaemonLost("no answer in time") from None
        finally:
            self._waiting.pop(number, None)

    def send(self, message: msg.Message) -> bool:
        """From the far side."""
        if not self._cut():
            self._back = max(self._back + 1e-9, self.world.later())
            asyncio.get_running_loop().call_at(self._back, self._hears, message)
        return self.identity in self.world.links

    def _hears(self, message: msg.Message) -> None:
        self.heard = time.monotonic()
        waiting = self._waiting.get(message.id)
        if waiting is not None and not waiting.done():
            waiting.set_result(message)
        elif message.id == 0 and self.identity in self.world.links:
            self._on_news(message)

    def fail(self, error: DaemonError) -> None:
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(error)

    async def close(self) -> None:
        self.world.links.pop(self.identity, None)
        self.fail(DaemonError("closed"))


class FakePush:
    """Holds every node that it is for, for a while; `missed` are those that it could not have."""

    def __init__(self, services, first, engines, last, keeper, claim, *, on_failed):
        world, self.services, self.first = services.world, services, first
        self.claimed = claim.nodes if claim is not None else set()
        name = claim.terms.push if claim is not None else f"{services.config.node.name}-{next(world.numbers)}"
        self.call = msg.Gather(push=name, group=first.group, model=first.model, version=first.version)
        self.repeat, self.held_up, self.done = bool(first.engines), {}, asyncio.Event()
        self.context = SimpleNamespace(push=name, lines=contextlib.nullcontext)
        self.session = SimpleNamespace(
            ended=False,
            version=first.version,
            model=first.model,
            error=None,
            push_deadline=time.monotonic() + first.timeout,
            finished=time.monotonic(),
        )
        home = services.config.node.name
        self.ranks = Ranks(self.call, first.world, home, services.send, services.peers)
        self.engines = {e: node for e, node in engines.items() if not first.engines or e in first.engines}
        self.missed: list[str] = []
        self._on_failed, self._world, self._home, self._complete = on_failed, world, home, asyncio.Event()
        world.pushes.append(self)
        self.ranks.call_on_nodes()
        self._work = asyncio.create_task(self._run())

    def open(self, identity, message, node=""):
        if message.rank not in self.ranks and not self.session.ended:
            self.ranks.add(message.rank, Rank(identity, message, time.monotonic(), node or self._home))
        if self.ranks.complete:
            self._complete.set()

    def hear(self, event):
        if getattr(event, "error", None) is not None and not self.session.ended:
            self._over(event.error)

    def check_alive(self, liveness):
        if not self.session.ended:
            self.ranks.call_on_nodes()

    async def _run(self):
        try:
            async with asyncio.timeout(self.first.timeout):
                for node in sorted({*self.engines.values(), *self.claimed} - {self._home}):
                    peer, wanted = self.services.peers[node], node in self.engines.values()
                    if wanted and peer.info is not None:
                        await self._hold(node, peer)
                await self._complete.wait()
                for node in self.ranks.nodes()[1:]:
                    await self._hold(node, self.services.peers[node])
                await asyncio.sleep(self._world.lasts(self.first.model))
        except TimeoutError:
            self._over(PushAborted("no rank called").record())
        else:
            self._over(None)

    async def _hold(self, node, peer):
        follower = self._world.nodes[node].follower
        await asyncio.sleep(self._world.later() - time.monotonic())
        try:
            if follower.leading.busy:
                await follower.leading.wind_up(time.monotonic() + 1)
            call = self.call
            await follower._hold.work(peer._link.identity, call.push, self._home, call.model, call.version)
        except PushRefused as error:
            self.missed.append(f"{node}: {error.message}")

    def _over(self, error: ErrorRecord | None) -> None:
        self.session.ended, self.session.error, self.session.finished = True, error, time.monotonic()
        for rank in self.ranks:
            self.ranks.tell(rank, msg.Ended(error=error))
        if error is not None:
            self._on_failed(self, error)
        asyncio.get_running_loop().call_later(self._world.tail, self.done.set)

    async def close(self):
        self.ranks.release(self.claimed | set(self.engines.values()), self.session.error)
        self._work.cancel()


class WorldTrainers(Trainers):
    async def _close(self, push):
        await push.close()


class Node:
    """One of them: `engines` gives by model the names of those that it has."""

    def __init__(self, world: World, name: str, engines: dict[str, str], known: tuple[str, ...]) -> None:
        self.world, self.name = world, name
        self.told: dict[bytes, ErrorRecord | None] = {}
        self.config = config = parse_node_config(f'[node]\nname = "{name}"\n')
        status = [
            msg.EngineStatus(name=e, node=name, kind="reference", url="http://x", model=model, state="serving")
            for model, e in engines.items()
        ]

        class Engines(list[Any]):
            def of_model(self, model):
                return [e.name for e in status if e.model == model]

            def keeper_of(self, model):
                return None

        async def let_go(context, until):
            pass

        executor: Any = SimpleNamespace(
            engines=Engines(SimpleNamespace(status=lambda _, one=one: one) for one in status), let_go=let_go
        )
        self.peers = {other: self._peer(other) for other in known}
        self.follower = Follower(
            config,
            f"{name}-1",
            executor,
            [],
            self.peers,
            rails=SimpleNamespace(taken=None, given_back=None),
            send=self.send,
            on_free=self._freed,
        )
        services: Any = SimpleNamespace(
            config=config, executor=executor, peers=self.peers, send=self.send, plans=None, world=world
        )
        self.trainers = WorldTrainers(services, Metrics(()), self.follower, self._freed)

    def _peer(self, other: str) -> Peer:
        return Peer(
            other,
            other,
            self.config,
            key=None,
            on_lost=lambda node, error: None,
            on_rank=lambda node, said: self.trainers.route_from(node, said),
            on_free=lambda: self.trainers.go_on(),
            taken=lambda node, names: None,
        )

    def _freed(self) -> None:  # as the server does
        self.trainers.go_on()
        if not self.busy:
            self.follower.tell_free()

    @property
    def busy(self) -> bool:
        return self.trainers.busy or self.follower.following is not None

    def send(self, identity: bytes, message: msg.Message) -> bool:
        if (link := self.world.links.get(identity)) is not None:
            return link.send(message)
        if identity.startswith(b"rank") and isinstance(message, msg.Ended):
            assert identity not in self.told, "an outcome is told once"
            self.told[identity] = message.error
        return identity.startswith(b"rank")

    def arrives(self, identity: bytes, message: msg.Message) -> None:  # as the reception does
        match message:
            case msg.Attach():
                self.world.spawn(self._answer(identity, message))
            case msg.Release():
                self.world.spawn(self.follower.release(identity, message.push, message.error))
            case msg.Gather():
                self.follower.gather(identity, message)
            case msg.TellRank():
                self.follower.tell(identity, message)

    async def _answer(self, identity: bytes, message: msg.Attach) -> None:
        answer = await self.follower.attach(identity, message)
        self.send(identity, msgspec.structs.replace(answer, id=message.id))

    def call(self, model: str, group: str, *, rank: int = 0, world: int = 1, timeout: float = 60.0, **more: Any) -> str:
        """A rank pushes; returns its name, by which `told` has what it was told."""
        name = f"rank{next(self.world.numbers)}-{group}"
        words = {"rank": rank, "world": world, "model": model, "group": group, "timeout": timeout, **more}
        self.trainers.open(name.encode(), msgspec.structs.replace(OPEN, version=1, engines=(), **words))
        return name

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(self.world.liveness / 5)
            for call in list(self.trainers.waiting._calls):
                self.trainers.heard(call.identity)
            self.trainers.check_alive(self.world.liveness)
            self.follower.heard(b"")
            self.follower.check(self.world.liveness)


class World:
    """`nodes` gives by name the engines of each, by model. `known` are the pairs that know each other; all, if None."""

    liveness = 5.0

    def __init__(self, nodes: dict[str, dict[str, str]], seed: int = 0, *, lasts: dict[str, float] | None = None):
        self._rng, self.numbers = Random(seed), itertools.count()
        self.tail, self.claims = 0.002, 0
        self.silent: set[str] = set()
        self.links: dict[bytes, Link] = {}
        self.pushes: list[FakePush] = []
        self._lasts = lasts or {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.nodes: dict[str, Node] = {}
        for name, engines in nodes.items():
            self.nodes[name] = Node(self, name, engines, tuple(n for n in nodes if n != name))

    def later(self) -> float:
        return time.monotonic() + self._rng.uniform(0.0002, 0.003)

    def lasts(self, model: str) -> float:
        return self._lasts.get(model, 0.0) or self._rng.uniform(0.005, 0.3)

    def spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def told(self, name: str) -> tuple[bool, ErrorRecord | None]:
        for node in self.nodes.values():
            if name.encode() in node.told:
                return True, node.told[name.encode()]
        return False, None

    def nothing_is_held(self) -> None:
        for node in self.nodes.values():
            assert node.follower.following is None, f"{node.name} is held by {node.follower.following}"
            assert node.trainers.push is None
            assert node.trainers._turns.claim is None
            assert len(node.trainers.waiting) == 0

    def run(self, script: Any) -> Any:
        """What `script(world)` returns, with all nodes attached before it."""
        patch = pytest.MonkeyPatch()
        loop = Clock()
        try:
            patch.setattr(time, "monotonic", loop.time)
            patch.setattr(trainers, "Push", FakePush)
            patch.setattr(peers, "PeerLink", lambda endpoint, *, patience, key, on_news: Link(self, endpoint, on_news))
            return loop.run_until_complete(self._main(script))
        finally:
            patch.undo()
            loop.close()

    async def _main(self, script: Any) -> Any:
        for node in self.nodes.values():
            self.spawn(node.watch())
            for peer in node.peers.values():
                self.spawn(peer.keep())
        try:
            await asyncio.sleep(2)
            assert all(peer.info is not None for node in self.nodes.values() for peer in node.peers.values())
            return await script(self)
        finally:
            mine = asyncio.all_tasks() - {asyncio.current_task()}
            for task in mine:
                task.cancel()
            await asyncio.gather(*mine, return_exceptions=True)
