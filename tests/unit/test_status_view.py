"""What an operator sees of a daemon, on 100 columns."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from rich.console import Console

from tests.wire_examples import ERROR
from weightsync.cli.status_view import status_view
from weightsync.wire import messages as msg

OUTCOME = msg.PushOutcome(
    model="policy", version=41, nbytes=61_000_000_000, tensors=18867, buckets=120, seconds=1.25,
    phases={
        "describe": 0.01, "plan": 0.0, "fill": 0.5, "export": 0.02, "wire": 0.25, "load": 1.0, "finalise": 0.1,
        "verify": 0.05,
    },
    engines=(
        msg.EngineOutcome(engine="e0", node="n0", outcome="committed", version=41, seconds=1.2),
        msg.EngineOutcome(engine="e1", node="n1", outcome="torn", version=None, seconds=1.2, error=ERROR),
    ),
)  # fmt: skip
STATUS = msg.Status(
    node="n0", software="weightsync 0.1.0", pid=4711, uptime=7300.0,
    engines=(
        msg.EngineStatus(
            name="e0", node="n0", kind="vllm", model="policy", url="http://127.0.0.1:8000", state="serving",
            version=41, tp_size=2,
        ),
        msg.EngineStatus(
            name="e1", node="n1", kind="sglang", model="policy", url="http://10.0.0.2:30000", state="torn", tp_size=8,
            error="its push ended half-way, and it is paused until the next one repairs it, which any push will do",
        ),
    ),
    bridges=(
        msg.BridgeStatus(
            node="n0", index=0, pid=4712, restarts=1, slots=3, slot_bytes=2**31, outstanding=2, taken=2, exports=480,
            revoked=1, holding={"e1/0": 1, "e1/7": 1}, gpu="4a8e9a0c-52f1-7d3e-9c10-8f5f0d1c2b3a",
        ),
    ),
    peers={"n1": "connected"},
    nodes=(
        msg.PeerStatus(
            node="n1", state="connected", endpoint="tcp://10.0.0.2:29600", engines=1, bridges=8, device="cuda"
        ),
    ),
    keepers=(msg.KeeperStatus(model="policy", pid=4713, version=41, nbytes=61_000_000_000),),
    last=OUTCOME, last_ago=65.0, device="cuda", leaks=1,
)  # fmt: skip
PUSH = msg.PushStatus(
    model="policy", version=42, state="transferring", seconds=3.21, nbytes=10**10, filled_bytes=25 * 10**8,
    waiting_for="rank 7 to fill bucket 9", buckets=12,
    engines=(msg.EngineProgress(engine="e0", stage="loading", loaded=8),),
)  # fmt: skip


def shown(status: msg.Status) -> str:
    console = Console(width=100, highlight=False)
    plain: dict[str, Any] = msgspec.to_builtins(status)
    with console.capture() as captured:
        console.print(status_view(plain, "03:00:00"))
    return captured.get()


def test_a_node_at_a_glance():
    text = shown(STATUS)
    assert "up 2 h, at 03:00:00" in text
    (engine,) = [line for line in text.splitlines() if line.startswith("e1 ")]
    assert engine.split() == ["e1", "n1", "policy", "sglang", "torn", "–", "8", "http://10.0.0.2:30000"]
    (bridge,) = [line for line in text.splitlines() if line.startswith("n0/0")]
    assert bridge.split() == ["n0/0", "4712", "3", "×", "2048", "MiB", "2", "GPU", "4a8e9a0c", "480", "2", "1", "1"]
    (peer,) = [line for line in text.splitlines() if line.startswith("n1 ")]
    assert peer.split() == ["n1", "1", "8", "GPUs", "tcp://10.0.0.2:29600", "connected"]
    assert "keeper of policy (pid 4713) keeps version 41, 61.00 GB" in text
    assert "no push is under way" in text


def test_what_is_wrong_is_in_whole_sentences():
    text = " ".join(shown(STATUS).split())
    assert "engine e1: its push ended half-way, and it is paused until the next one repairs it, which any" in text
    assert "bridge n0/0: exports that were not closed, with no push under way: e1/0 1, e1/7 1" in text
    assert "1 exports were never given back" in text
    assert "cluster.seed" not in text
    lonely = " ".join(
        shown(msgspec.structs.replace(STATUS, seed="the daemon at tcp://n1:29600 did not answer")).split()
    )
    assert (
        "cluster.seed is not reached, so nodes that come stay unknown: the daemon at tcp://n1:29600 did not" in lonely
    )
    under_way = " ".join(shown(msgspec.structs.replace(STATUS, push=PUSH)).split())
    assert "with no push under way" not in under_way  # they are what a push is made of


def test_a_push_of_another_node():
    """Its exports are open here while it is under way, and nothing is wrong with that."""
    follows = msg.FollowedPush(push="n1-ab", model="policy", version=42, seconds=3.21)
    text = " ".join(shown(msgspec.structs.replace(STATUS, follows=follows)).split())
    assert "with no push under way" not in text
    assert "takes part in version 42 of policy, which another node pushes, for 3.2 s" in text
    assert "no push is under way" not in text


def test_why_a_bridge_was_restarted():
    (bridge,) = STATUS.bridges
    back = msgspec.structs.replace(bridge, error="it was killed by signal 9")
    gone = msgspec.structs.replace(back, pid=None)
    text = shown(msgspec.structs.replace(STATUS, bridges=(back,)))
    assert "bridge n0/0: last restart: it was killed by signal 9" in text
    text = shown(msgspec.structs.replace(STATUS, bridges=(gone,)))
    assert "bridge n0/0: it was killed by signal 9" in text


def test_the_last_push_by_phase():
    lines = shown(STATUS).splitlines()
    assert "last push, 65 s ago: version 41 of policy: 61.00 GB in 120 buckets, 1.250 s, 48.80 GB/s" in lines
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("  ")}
    assert rows["fill"] == ["0.5000", "122.00"]
    assert rows["verify"] == ["0.0500"]
    assert rows["e0"] == ["committed,", "e1", "torn"]


def test_a_push_that_failed_says_what_to_do():
    text = shown(msgspec.structs.replace(STATUS, last_error=ERROR))
    assert "version 41 of policy failed after 1.250 s: no" in text
    assert "hint: yes" in text


def test_a_call_that_came_to_no_push_is_told_of_beside_the_last_push():
    """What an alert on failed calls is about may be no push at all."""
    refused = msgspec.structs.replace(ERROR, message="no engine serves model 'typo'", model="typo", version=7)
    text = " ".join(shown(msgspec.structs.replace(STATUS, refused=refused, refused_ago=200.0)).split())
    assert (
        "last push_weights call refused before it started, 3 min ago: version 7 of typo: no engine serves model 'typo'"
        in text
    )
    assert "hint: yes" in text
    assert "last push, 65 s ago: version 41 of policy: 61.00 GB" in text


def test_the_push_under_way():
    text = shown(msgspec.structs.replace(STATUS, push=PUSH))
    assert "pushing version 42 of policy: transferring for 3.2 s, 2.50 GB of 10.00 GB filled (25 %)" in text
    assert "waiting for rank 7 to fill bucket 9" in text
    assert "e0: loading, 8 of 12 buckets" in text


@pytest.mark.parametrize(("free", "told"), [(10**6, True), (10**12, False), (None, False)])
def test_shared_memory_that_runs_out(free, told):
    text = shown(msgspec.structs.replace(STATUS, device="cpu", shm_free=free))
    assert ("shared memory is nearly full: 1.0 MB free" in text) == told


def test_a_daemon_that_has_just_started():
    text = shown(msgspec.structs.replace(STATUS, engines=(), bridges=(), nodes=(), keepers=(), last=None, leaks=0))
    assert [line for line in text.splitlines() if line.strip()][-1] == "no push is under way"


def test_nothing_is_wider_than_the_terminal():
    text = shown(msgspec.structs.replace(STATUS, push=PUSH))
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
    assert "…" not in text


def test_watching_outlives_the_daemon(tmp_path):
    from weightsync.cli.looking import _watched

    console = Console(width=200, markup=False)
    with console.capture() as captured:
        console.print(_watched(f"ipc://{tmp_path}/none.sock"))
    assert "no weightsyncd listens at" in captured.get()
