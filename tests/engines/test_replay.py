"""The engine's loader recorded, proved and replayed, inside real vLLM and SGLang workers.

What replays is told as operators see it; what an engine generates after a replayed push is what transformers generates
from the same checkpoint. On a CPU without AMX (vLLM 0.32.0, SGLang 0.5.23) SGLang's kernels read the parameters as they
are loaded, and all replay; vLLM gives all but the norms to oneDNN in a form of its own, and its loader has to.
"""

from __future__ import annotations

import asyncio
import io
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from rich.console import Console

from tests.engines.yard import Need
from tests.hand_push import HandPush, as_bytes, connected, sent, soon
from tests.places_kit import write
from weightsync.cli.views import replay_details
from weightsync.plan.replay_facts import LAYOUTS
from weightsync.testing import eventually

pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]

SGLANG, VLLM = Need("sglang", "plugin"), Need("vllm", "plugin")
PACKED = "more is done with it than copying (_C.create_onednn_mm_handler)"


def ways(*needs: Need, slow: bool = False) -> Any:
    marks = [pytest.mark.engines_slow] if slow else []
    return pytest.mark.parametrize("node", [pytest.param(n, id=str(n), marks=marks) for n in needs], indirect=True)


def facts(node: Any, phase: str, tensors: int | None = None) -> Any:
    """What the daemon knows of its engine's replay, once that is in this phase, with so many tensors."""

    def there() -> bool:
        found = node.engine_status().replay
        whole = tensors is None or (found is not None and found.replayed + found.by_loader == tensors)
        return found is not None and found.phase == phase and whole

    assert eventually(there, seconds=30), f"{node.engine_status().replay}\n{node.logs()}"
    return node.engine_status().replay


def recorded_anew(node: Any, tag: str) -> Any:
    """The facts after a first push of the whole layout: the server may have had it from other tests before."""
    weights = node.weights(tag)
    norms = [name for name in weights if "norm" in name]
    for count in range(1, LAYOUTS + 1) if node.engine_status().replay is not None else ():
        node.push({name: weights[name] for name in norms[:count]})
    node.push(tag)
    return facts(node, "record", len(weights))


def up_to_replay(node: Any, *tags: str) -> Any:
    """The facts of the first replayed push; what is generated is looked at after each."""
    first = recorded_anew(node, tags[0])
    node.check(tags[0])
    for tag, phase in zip(tags[1:], ("prove", "replay", "replay"), strict=True):
        report = node.push(tag)
        found = facts(node, phase)
        assert report.engines[0].checked == found.replayed, "what replays is compared where it lies"
        node.check(tag)
    assert found.why == first.why, "the proof found nothing"
    assert bool(found.pulled) == (not found.by_loader), "what no loader needs is taken out of the slots"
    print(shown(node))
    return found


def in_place(node: Any, *tags: str) -> None:
    """What replays as a whole can be read where the trainer has it."""
    for tag in tags:
        report = node.push(tag, in_place=True)
        assert [engine.drawn for engine in report.engines] == [True]
        assert report.engines[0].checked == facts(node, "replay").replayed
        node.check(tag)


def written_by_others(node: Any, *tags: str) -> None:
    """It can be written where the engine shows its places, too: by hand, once this hand's pushes have been replayed."""

    more = {"api_key": None, "ca_file": None, "path": node.need.path, "gpus": (), "target": "all"}
    spec: Any = SimpleNamespace(name="engine", kind=node.need.kind, url=node.engine.url, **more)

    async def push() -> None:
        with HandPush(slot_bytes=256 << 10) as hand:
            async with connected(spec) as hands:
                for tag in tags[:1] * 3:
                    await hand.push(hands, next(node.versions), as_bytes(node.weights(tag).items()))
                digests = set()
                for tag in tags:
                    tensors, version = as_bytes(node.weights(tag).items()), next(node.versions)
                    manifest = hand.manifest(tensors)
                    info = await hands.probe(deadline=soon())
                    assert hands.draws(manifest)
                    await hands.pause("keep", deadline=soon())
                    await hands.begin(version, manifest, hand.offers("engine", info.tp_size), deadline=soon())
                    found = await hands.places(deadline=soon())
                    assert not isinstance(found, str), found
                    assert len(found.ranks) == info.tp_size
                    digests.add(found.digest)
                    await asyncio.to_thread(write, found.ranks, manifest, tensors)
                    await hands.finish(version, deadline=soon())
                    checked = await hands.verify(manifest, sent(manifest, tensors), deadline=soon())
                    assert checked == len(tensors)
                    await hands.resume(deadline=soon())
                    await asyncio.to_thread(node.check, tag)
                assert len(digests) == 1

    asyncio.run(push())


def shown(node: Any) -> str:
    console = Console(width=160, file=io.StringIO())
    console.print(replay_details(msgspec.to_builtins([node.engine_status()])))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "replays" in text
    return str(text)


@ways(SGLANG)
def test_sglang_replays_all(node):
    found = up_to_replay(node, "pert", "base", "pert", "base")
    weights = node.weights("base")
    assert (found.replayed, found.by_loader, found.why) == (len(weights), 0, {})
    assert found.replayed_bytes == sum(w.nbytes for w in weights.values())
    in_place(node, "pert", "base", "pert")
    written_by_others(node, "pert", "base")
    node.push("base")
    node.check("base")


@ways(VLLM)
def test_vllm_replays_what_it_does_not_pack(node):
    found = up_to_replay(node, "pert", "base", "pert", "base")
    weights = node.weights("base")
    assert found.replayed == sum("norm" in name for name in weights)
    assert found.by_loader == len(weights) - found.replayed
    assert list(found.why) == [PACKED]
    assert node.engine.child is not None
    log = node.engine.child.log
    before = log.stat().st_size
    report = node.push("pert", in_place=True)
    assert [engine.drawn for engine in report.engines] == [False], "its loader has to see what it packs"
    assert b"RMSNorm: Failed to load weights" not in log.read_bytes()[before:], "layers that replay are not waited for"


@ways(Need("sglang", "plugin", "moe"), slow=True)
def test_stacked_experts(node):
    found = up_to_replay(node, "pert", "base", "pert", "base")
    assert (found.by_loader, found.why) == (0, {})
    in_place(node, "pert", "base")


@ways(Need("vllm", "plugin", "moe"), slow=True)
def test_packed_experts(node):
    found = up_to_replay(node, "pert", "base", "pert", "base")
    assert found.replayed == sum("norm" in name for name in node.weights("base"))


@ways(Need("sglang", "plugin", "tied", dtype="bfloat16"), slow=True)
def test_tied_embeddings_and_a_conversion(node):
    recorded_anew(node, "pert")
    for phase in ("prove", "replay"):
        node.push("base")
        facts(node, phase)
    node.push("pert")
    node.check("pert")
    assert facts(node, "replay").replayed == len(node.weights("pert"))


@ways(Need("sglang", "plugin", tp=2), slow=True)
def test_two_ranks(node):
    found = up_to_replay(node, "pert", "base", "pert", "base")
    assert (found.by_loader, found.why) == (0, {})
    in_place(node, "pert", "base")
    written_by_others(node, "pert", "base")
