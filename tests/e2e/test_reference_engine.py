"""A real reference engine: processes, HTTP, tensor parallelism, weights over shared memory."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from typing import TYPE_CHECKING

import pytest

from tests.engine_process import EngineProcess, running_engine
from tests.hand_push import HandPush, Tensors, as_bytes, connected, sent, soon
from tests.places_kit import write_elsewhere
from weightsync.adapters.reference.config import ModelConfig
from weightsync.adapters.reference.model import CausalLM, greedy, load_checkpoint, random_checkpoint
from weightsync.errors import EngineError, EngineLost, EngineRefused

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.e2e

PROMPT = [5, 17, 211, 3, 42]
TOKENS = 12
MOE = ModelConfig(
    architecture="Qwen3MoeForCausalLM",
    vocab_size=301,  # odd: the vocabulary is padded
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=1,  # fewer than ranks: replicated
    head_dim=16,
    max_position_embeddings=4096,
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    norm_topk_prob=True,
    decoder_sparse_step=2,  # layer 0 dense, layer 1 with experts
)
TIED = ModelConfig(
    vocab_size=301,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
    dtype="bfloat16",
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    for seed in range(3):
        random_checkpoint(MOE, root / f"moe{seed}", seed)
    for seed in range(2):
        random_checkpoint(TIED, root / f"tied{seed}", seed)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def models(checkpoints: dict[str, Path]) -> dict[str, CausalLM]:
    return {name: load_checkpoint(path) for name, path in checkpoints.items()}


@pytest.fixture(scope="module")
def engine(checkpoints: dict[str, Path]) -> Iterator[EngineProcess]:
    with running_engine(checkpoints["moe0"], tp=2, faults=True) as running:
        yield running
        running.process.terminate()
        assert running.wait_exit() == 0
        assert "Traceback" not in running.log


@pytest.fixture
def hand() -> Iterator[HandPush]:
    with HandPush(slot_bytes=52 << 10) as push:  # less than the embedding, so that tensors come in pieces
        yield push


def repair(engine: EngineProcess, hand: HandPush, version: int, tensors: Tensors) -> None:
    async def push() -> None:
        async with connected(engine) as hands:
            assert await hand.push(hands, version, tensors) == len(tensors)

    asyncio.run(push())


def test_it_serves_its_checkpoint_as_the_whole_model_would(engine: EngineProcess, models: dict[str, CausalLM]) -> None:
    answer = engine.generate(PROMPT, TOKENS)
    if engine.info()["weight_version"] is None:
        assert answer["token_ids"] == greedy(models["moe0"], PROMPT, TOKENS)
    assert answer["finish_reason"] == "length"
    assert len(answer["logprobs"]) == TOKENS


def test_a_push_by_hand_arrives_bit_for_bit(engine: EngineProcess, models: dict[str, CausalLM], hand: HandPush) -> None:
    before = engine.get("/checksums").body
    for version, name in ((1, "moe1"), (2, "moe2")):
        tensors = as_bytes(models[name].named_parameters())
        repair(engine, hand, version, tensors)
        answer = engine.generate(PROMPT, TOKENS)
        assert answer["token_ids"] == greedy(models[name], PROMPT, TOKENS)
        assert answer["weight_version"] == engine.info()["weight_version"] == version
    after = engine.get("/checksums").body
    assert len(after) == 2
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_weights_that_are_not_those_sent_are_found(
    engine: EngineProcess, models: dict[str, CausalLM], hand: HandPush
) -> None:
    """What lies in the engine is compared, not what was sent to it: for another model's sums, it differs."""
    tensors, others = (as_bytes(models[name].named_parameters()) for name in ("moe1", "moe2"))
    repair(engine, hand, 3, tensors)

    async def verify() -> None:
        async with connected(engine) as hands:
            manifest = hand.manifest(tensors)
            expected = sent(manifest, tensors)
            assert await hands.verify(manifest, expected, deadline=soon()) == len(tensors)
            name = manifest.tensors.names[-1]
            others_too = sent(manifest, {**tensors, name: others[name]})
            with pytest.raises(EngineError, match=f"'{name}' in the engine differs from what the trainer sent"):
                await hands.verify(manifest, others_too, deadline=soon())

    asyncio.run(verify())


def test_what_others_write_into_its_places_arrives(
    engine: EngineProcess, models: dict[str, CausalLM], hand: HandPush
) -> None:
    """One byte that is wrong is found, and named."""

    async def push() -> None:
        async with connected(engine) as hands:
            digests = []
            for version, name, wrong in ((11, "moe1", False), (12, "moe2", True), (13, "moe0", False)):
                tensors = as_bytes(models[name].named_parameters())
                manifest = hand.manifest(tensors)
                await hands.accept(manifest, deadline=soon())
                await hands.pause("keep", deadline=soon())
                await hands.begin(version, manifest, hand.offers("engine", 2), deadline=soon())
                shown = await hands.places(deadline=soon())
                assert not isinstance(shown, str)
                digests.append(shown.digest)
                written, odd = dict(tensors), manifest.tensors.names[3]
                if wrong:
                    dtype, shape, data = written[odd]
                    written[odd] = dtype, shape, bytes([data[0] ^ 1]) + data[1:]
                await asyncio.to_thread(write_elsewhere, shown.ranks, manifest, written)
                await hands.finish(version, deadline=soon())
                expected = sent(manifest, tensors)
                if wrong:
                    with pytest.raises(EngineError, match=f"'{odd}' in the engine differs from what the trainer sent"):
                        await hands.verify(manifest, expected, deadline=soon())
                    assert not hands.draws(manifest), "the next is by slots"
                    continue
                assert await hands.verify(manifest, expected, deadline=soon()) == len(tensors)
                await hands.resume(deadline=soon())
                assert engine.generate(PROMPT, TOKENS)["token_ids"] == greedy(models[name], PROMPT, TOKENS)
            assert len(set(digests)) == 1

    asyncio.run(push())


def test_a_worker_error_leaves_it_torn_until_the_next_whole_push(
    engine: EngineProcess, models: dict[str, CausalLM], hand: HandPush
) -> None:
    tensors = as_bytes(models["moe1"].named_parameters())

    async def broken() -> None:
        async with connected(engine) as hands:
            manifest = hand.manifest(tensors)
            await hands.accept(manifest, deadline=soon())
            await hands.begin(10, manifest, hand.offers("engine", 2), deadline=soon())
            tickets = hand.tickets(manifest, 0, tensors, "engine", 2)
            hand.arena.slot(0)[7] ^= 1  # after it was exported
            with pytest.raises(EngineError, match=r"tp_rank \d: .*differs from what was exported"):
                await hands.load(0, tickets, deadline=soon())
            info = await hands.probe(deadline=soon())
            assert info.torn
            assert info.paused  # it was serving: what is torn must not
            with pytest.raises(EngineError, match="torn"):
                await hands.resume(deadline=soon())
            with pytest.raises(EngineError, match="no update is open"):
                await hands.finish(10, deadline=soon())
            part = {name: tensors[name] for name in list(tensors)[:3]}
            with pytest.raises(EngineRefused, match=r"not in this push.*and \d+ more"):
                await hands.accept(hand.manifest(part), deadline=soon())

    asyncio.run(broken())
    repair(engine, hand, 11, tensors)
    assert engine.generate(PROMPT, TOKENS)["token_ids"] == greedy(models["moe1"], PROMPT, TOKENS)
    info = engine.info()
    assert (info["torn"], info["paused"], info["weight_version"]) == (False, False, 11)


def test_an_unfinished_update_is_repaired_by_the_next_begin(
    engine: EngineProcess, models: dict[str, CausalLM], hand: HandPush
) -> None:
    tensors = as_bytes(models["moe2"].named_parameters())

    async def half() -> None:
        async with connected(engine) as hands:
            manifest = hand.manifest(tensors)
            await hands.accept(manifest, deadline=soon())
            await hands.pause("keep", deadline=soon())
            await hands.begin(20, manifest, hand.offers("engine", 2), deadline=soon())
            tickets = hand.tickets(manifest, 0, tensors, "engine", 2)
            await hands.load(0, tickets, deadline=soon())
            with pytest.raises(EngineError, match="loaded before"):
                await hands.load(0, tickets, deadline=soon())
            with pytest.raises(EngineError, match=r"tensor '.*' was not loaded"):
                await hands.finish(20, deadline=soon())

    asyncio.run(half())
    assert engine.info()["torn"]
    assert engine.post("/resume").status == 409
    repair(engine, hand, 21, tensors)
    assert engine.generate(PROMPT, TOKENS)["token_ids"] == greedy(models["moe2"], PROMPT, TOKENS)


def test_requests_go_on_through_a_push_without_pause(
    engine: EngineProcess, models: dict[str, CausalLM], hand: HandPush
) -> None:
    """In flight from before the push until after it: on old, then on new weights, and on no cache of the old ones."""
    prompt = PROMPT * 4
    answers = []
    running = threading.Thread(target=lambda: answers.append(engine.generate(prompt, 40)))
    tensors = as_bytes(models["moe1"].named_parameters())

    async def push() -> None:
        async with connected(engine) as hands:
            await hands.pause("keep", deadline=soon())
            running.start()
            await asyncio.to_thread(engine.wait_running, 1)
            await hands.resume(deadline=soon())
            await hand.push(hands, 30, tensors, pause="none")

    asyncio.run(push())
    running.join(timeout=30)
    assert answers[0]["finish_reason"] == "length"
    assert len(answers[0]["token_ids"]) == 40
    assert answers[0]["weight_version"] == 30
    assert engine.generate(PROMPT, TOKENS)["token_ids"] == greedy(models["moe1"], PROMPT, TOKENS)


def test_kept_requests_continue_on_the_new_weights(
    engine: EngineProcess, models: dict[str, CausalLM], hand: HandPush
) -> None:
    """A request that was never started before the pause decodes wholly on the new weights."""
    answers = []
    running = threading.Thread(target=lambda: answers.append(engine.generate(PROMPT, TOKENS)))
    assert engine.post("/pause", {"mode": "keep"}).status == 200
    running.start()
    repair(engine, hand, 40, as_bytes(models["moe0"].named_parameters()))
    running.join(timeout=30)
    assert answers[0]["token_ids"] == greedy(models["moe0"], PROMPT, TOKENS)
    assert answers[0]["weight_version"] == 40


def test_ordered_faults(engine: EngineProcess) -> None:
    assert engine.post("/faults", {"fail": {"endpoint": "/info", "status": 503, "after": 1}}).status == 200
    assert [engine.get("/info").status for _ in range(3)] == [200, 503, 200]
    assert engine.post("/faults", {"fail": {"endpoint": "/info", "status": 200}}).status == 400


def test_a_killed_worker_ends_the_whole_engine(checkpoints: dict[str, Path], models: dict[str, CausalLM]) -> None:
    """Started blank: only a whole push makes it serve. Tied and bfloat16, by the way. Then a worker is killed."""
    tensors = as_bytes(models["tied1"].named_parameters())
    with running_engine(checkpoints["tied0"], tp=2, load_format="dummy", api_key="hush") as engine, HandPush() as hand:
        assert engine.info()["blank"]
        assert engine.post("/generate", {"prompt_ids": PROMPT}).status == 503

        async def push() -> None:
            async with connected(engine) as hands:
                part = {name: tensors[name] for name in list(tensors)[1:]}
                with pytest.raises(EngineRefused, match=r"model\.embed_tokens\.weight: not in this push"):
                    await hands.accept(hand.manifest(part), deadline=soon())
                assert await hand.push(hands, 1, tensors) == len(tensors)
                stray = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
                with pytest.raises(EngineRefused, match=r"lm_head\.weight: this model ties it"):
                    await hands.accept(hand.manifest(stray), deadline=soon())
                await hand.push(hands, 2, tensors, aliases=[("lm_head.weight", "model.embed_tokens.weight")])
                assert engine.generate(PROMPT, TOKENS)["token_ids"] == greedy(models["tied1"], PROMPT, TOKENS)
                engine.kill_worker(1)
                assert await asyncio.to_thread(engine.wait_exit) == 1
                with pytest.raises(EngineLost):
                    await hands.probe(deadline=soon(5))

        asyncio.run(push())


def test_an_engine_that_cannot_start_says_why(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    (tmp_path / "config.json").write_bytes((checkpoints["tied0"] / "config.json").read_bytes())
    with pytest.raises(AssertionError, match=r"(?s)ended with status 2.*holds no \*\.safetensors"):
        running_engine(tmp_path).__enter__()
    with pytest.raises(AssertionError, match=r"(?s)ended with status 2.*num_attention_heads is 4"):
        running_engine(checkpoints["tied0"], tp=3).__enter__()


def test_the_front_takes_its_workers_along(checkpoints: dict[str, Path]) -> None:
    with running_engine(checkpoints["tied0"], tp=2) as engine:
        assert not {name for name in os.listdir("/dev/shm") if "reference" in name}
        engine.process.kill()
        assert engine.wait_exit() == -signal.SIGKILL
