"""Pushes into real vLLM and SGLang servers, each way into them.

What an engine generates after a push is compared with what transformers generates from the same checkpoint: greedy
tokens, and their logprobs to 1e-4.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys

import httpx
import pytest
import torch

from tests.engines.kit import installed, oracle
from tests.engines.yard import Need, Part
from weightsync.errors import SourceError, WeightSyncError
from weightsync.sources.checkpoint import CheckpointSource

pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]

OLD_SGLANG = tuple(map(int, re.findall(r"\d+", installed("sglang"))[:3])) < (0, 5, 21)
IPC = Need("sglang", "ipc")  # in old ones CUDA's alone
GROUP = Need("sglang", "group")
SGLANG = [Need("sglang", "tensor"), *([] if OLD_SGLANG else [IPC]), GROUP, Need("sglang", "plugin")]
VLLM = [Need("vllm", "plugin"), Need("vllm", "extension")]
LONGER = 7000  # tokens: a request that no push outlives
PROMPTS = ([5, 17, 211, 3, 42], [66, 4])
MIB = 2**20


def ways(*needs: Need, slow: tuple[Need, ...] = (GROUP, IPC)):
    """Run the test for each need; those in `slow` by `make test-engines-all` alone."""
    found = [pytest.param(need, id=str(need)) for need in needs if need not in slow]
    later = [need for need in slow if need in needs]
    found += [pytest.param(need, id=str(need), marks=pytest.mark.engines_slow) for need in later]
    return pytest.mark.parametrize("node", found, indirect=True)


def _running(requests):
    """Those that no push comes too late for: on two cores the second may begin when the first is nearly done."""
    found = [request for request in requests if len(request.tokens) < LONGER // 2]
    assert found
    return found


# --- what a push is for ---------------------------------------------------------------------------------------------


@ways(*SGLANG, *VLLM, slow=())
def test_there_and_back(node):
    for tag in ("pert", "base", "pert"):
        report = node.push(tag)
        node.check(tag)
        assert report.bytes == sum(w.nbytes for w in node.weights(tag).values())
        assert report.buckets > 2, "more buckets than slots, or the test shows little"
        assert node.engine.weight_version() == str(report.version)


@ways(*SGLANG, *VLLM)
def test_requests_are_kept_and_go_on_with_the_new_weights(node):
    if node.need.kind == "sglang" and OLD_SGLANG:
        pytest.skip("keep is wait there: its cache cannot be flushed while requests are queued")
    node.push("base")
    requests = _running(node.engine.start_requests(PROMPTS, LONGER))
    node.push("pert", pause="keep")
    for request in requests:
        request.wait_tokens(24)
    for request in requests:
        request.leave()
        assert not request.error
        node.check_goes_on(request)
    node.check("pert")


@ways(*SGLANG, *VLLM)
def test_requests_are_waited_for(node):
    node.push("base")
    wanted = [node.engine.generate(prompt, 300).tokens for prompt in PROMPTS]
    requests = node.engine.start_requests(PROMPTS, 300)
    node.push("pert", pause="wait")
    for request, tokens in zip(requests, wanted, strict=True):
        request.wait_end()
        assert (request.error, tuple(request.tokens)) == ("", tokens)
    node.check("pert")


@ways(*SGLANG, *VLLM)
def test_requests_are_aborted(node):
    node.push("base")
    requests = _running(node.engine.start_requests(PROMPTS, LONGER))
    node.push("pert", pause="abort")
    for request in requests:
        request.wait_end()
        assert len(request.tokens) < LONGER
    node.check("pert")


@ways(*SGLANG, *VLLM)
def test_requests_are_not_even_paused(node):
    node.push("base")
    requests = _running(node.engine.start_requests(PROMPTS, LONGER))
    node.push("pert", pause="none")
    for request in requests:
        request.wait_tokens(24)
        request.leave()
        assert not request.error
    node.engine.flush_cache()  # it is kept for those requests
    node.check("pert")


@ways(*SGLANG, *VLLM)
def test_a_model_in_two_parts(node):
    node.push("base")
    parts: list[dict[str, torch.Tensor]] = [{}, {}]
    for name, tensor in node.weights("pert").items():
        parts[name.startswith("model.layers.1.")][name] = tensor
    for part in parts:
        node.push(part)
    node.check("pert")


@ways(*SGLANG, *VLLM, slow=(IPC, GROUP, VLLM[1]))
def test_fifty_versions_leave_memory_as_it_was(node):
    def push(count: int) -> tuple[int, int]:
        for number in range(count):
            node.push("pert" if number % 2 else "base")
        return node.engine.rss(), len(node.engine.segments())

    rss, segments = push(10)
    rss_after, segments_after = push(40)
    assert rss_after - rss < 32 * MIB, f"{(rss_after - rss) / MIB:.0f} MiB more after 40 pushes"
    assert segments_after <= segments
    node.check("pert")


@ways(SGLANG[0], VLLM[0])
def test_the_command(node):
    command = ("push", str(node.folder("pert")), "--version", str(next(node.versions)), "--json")
    pushed = subprocess.run(
        [sys.executable, "-m", "weightsync.cli", *command, "--daemon", node.daemon.endpoint],
        capture_output=True,
        timeout=60,
        check=True,
        env=node.fleet.env,
    )
    assert json.loads(pushed.stdout)["complete"]
    node.check("pert")


# --- what is wrong with the weights ---------------------------------------------------------------------------------


@ways(*SGLANG, *VLLM)
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.9.mlp.up_proj.weight", (256, 128)),
        ("model.layers.0.self_attn.q_projj.weight", (128, 128)),
        ("model.norm.weight", (129,)),
        ("model.layers.0.mlp.gate_proj.weight", (512, 128)),
    ],
    ids=["no such layer", "no such projection", "odd norm", "double gate"],
)
def test_a_tensor_that_the_engine_has_no_place_for_is_refused(node, name, shape):
    before = node.push("base").version
    with pytest.raises(WeightSyncError, match=name.replace(".", r"\.")):
        node.push(node.weights("pert") | {name: torch.zeros(shape)})
    assert node.engine.weight_version() == str(before), "it was touched"
    node.check("base")
    node.push("pert")
    node.check("pert")


@ways(*SGLANG, *VLLM)
def test_weights_that_are_no_numbers_do_not_stop_the_engine(node):
    node.push(node.weights("base") | {"model.norm.weight": torch.full((128,), float("nan"))})
    with contextlib.suppress(httpx.HTTPStatusError):  # any answer will do
        node.engine.generate(PROMPTS[0], 4, seconds=30)
    node.push("base")
    node.check("base")


# --- what ends during a push ----------------------------------------------------------------------------------------


@ways(*SGLANG, *VLLM)
def test_a_trainer_that_fails_during_a_push(node):
    def fail() -> None:
        raise SourceError("the disk is gone")

    node.push("base")
    with CheckpointSource(node.folder("pert")) as source, pytest.raises(WeightSyncError, match="the disk is gone"):
        node.try_push(Part(source, fail))
    node.wait_state("torn")
    node.push("pert")
    node.check("pert")


@ways(*SGLANG, *VLLM)
def test_a_daemon_killed_during_a_push(node):
    node.push("base")
    with CheckpointSource(node.folder("pert")) as source, pytest.raises(WeightSyncError):
        node.try_push(Part(source, node.daemon.kill))
    node.fleet.restart_daemon(node.daemon)
    node.wait_state("torn")
    node.push("pert")
    node.check("pert")


@ways(*SGLANG, *VLLM, slow=(SGLANG[0], IPC, SGLANG[-1], VLLM[1]))
def test_an_engine_killed_during_a_push(node):
    node.push("pert")
    with CheckpointSource(node.folder("base")) as source, pytest.raises(WeightSyncError):
        node.try_push(Part(source, node.engine.kill))
    node.wait_state("lost")
    node.restart_engine()
    node.push("pert")
    node.check("pert")


# --- other models ---------------------------------------------------------------------------------------------------


def _other(checkpoint: str, tp: int = 1, dtype: str = "float32") -> list[Need]:
    return [Need(n.kind, n.path, checkpoint, tp, dtype) for n in (*SGLANG, *VLLM)]


MOE, TIED, TP2 = _other("moe"), _other("tied", dtype="bfloat16"), _other("dense", tp=2)


@ways(*MOE)
def test_experts(node):
    for tag in ("pert", "base"):
        node.push(tag)
        node.check(tag)


@ways(*TIED, slow=tuple(need for need in TIED if need.kind == "vllm"))
def test_tied_embeddings(node):
    node.push("base")
    for prompt, exact in oracle("tied_base").said.items():
        said = node.engine.generate(prompt, 1)
        assert said.tokens == exact.tokens[:1]
        assert said.logprobs == pytest.approx(exact.logprobs[:1], abs=0.2), "in bfloat16"
    node.push("pert")
    node.check("pert")


@ways(*(need for need in TP2 if need.path != "ipc"))
def test_two_ranks(node):
    for tag in ("pert", "base"):
        report = node.push(tag)
        node.check(tag)
        assert node.engine_status().tp_size == 2
        assert report.complete


@ways(*(need for need in TP2 if need.kind == "vllm" and need.path != "ipc"))
def test_two_ranks_of_which_a_call_has_failed(node):
    """vLLM by itself takes each later answer of rank 1 for one to the call after."""

    def ask(method, *args):
        body = {"method": method, "args": args}
        return httpx.post(f"{node.engine.url}/collective_rpc", json=body, trust_env=False, timeout=60)

    assert ask("no_such_method").status_code == 500
    said = ask("weightsync", '{"do": "hello"}').raise_for_status().json()["results"]
    assert [worker["rank"] for worker in said] == [0, 1]
    node.push("pert")
    node.check("pert")


@ways(*(need for need in TP2 if need.path == "ipc"))
def test_two_ranks_on_a_cpu_are_refused_by_the_way_that_cannot_tell_them_apart(node):
    with pytest.raises(WeightSyncError, match="only --tp 1"):
        node.push("pert")
    node.check("base")
