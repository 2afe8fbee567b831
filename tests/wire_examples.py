"""One example of every message, with every field set.

`tests/golden` holds their bytes: the first file as they were at first, each later file the changes since.
"""

from __future__ import annotations

from weightsync.config import EngineConfig
from weightsync.errors import ErrorRecord
from weightsync.plan.shares import MemberPart
from weightsync.wire import messages as msg

ERROR = ErrorRecord(
    kind="PushRefused",
    message="no",
    model="default",
    version=3,
    rank=1,
    engine="e0",
    bucket=2,
    phase="load",
    hint="yes",
)
ENGINE = msg.EngineStatus(
    name="e0", node="n0", kind="reference", model="default", url="http://127.0.0.1:1", state="serving", version=3,
    tp_size=2, software="reference 0.1.0", profile="v1", error="none",
)  # fmt: skip
OUTCOME = msg.PushOutcome(
    model="default", version=3, nbytes=1000, tensors=2, buckets=1, seconds=0.5, phases={"fill": 0.25},
    engines=(
        msg.EngineOutcome(engine="e0", node="n0", outcome="committed", version=3, seconds=0.5, checked=2, not_pushed=1),
        msg.EngineOutcome(engine="e1", node="n1", outcome="torn", version=None, seconds=0.0, error=ERROR),
    ),
)  # fmt: skip
DIGEST = bytes(range(16))

EXAMPLES: tuple[msg.Message, ...] = (
    msg.Open(
        id=7, group="trainer-1", rank=1, world=2, model="default", version=3, pause="keep", timeout=600.0,
        layout=DIGEST, plan=DIGEST[::-1], describe_seconds=0.25,
    ),
    msg.Welcome(id=7, node="n0", heartbeat=1.0),
    msg.AskDescription(id=7),
    msg.Describe(id=7, layout=b"\x01\x02\x03"),
    msg.Planned(id=7, plan=DIGEST, offers=(b"offer",), manifest=b"manifest", fills=b"\x00\x00\x00\x00"),
    msg.Lease(id=7, bucket=1, bridge=0, slot=2),
    msg.Filled(id=7, bucket=1, nbytes=512, tensors=b"\x01\x00\x00\x00", fingerprints=b"\x01" * 8),
    msg.Exposed(id=7, digest=DIGEST, exposure=b"exposure"),
    msg.AskExposure(id=7),
    msg.Measured(id=7, nbytes=512, tensors=b"\x01\x00\x00\x00", fingerprints=b"\x01" * 8),
    msg.Drawn(id=7),
    msg.Failed(id=7, error=ERROR),
    msg.Stopped(id=7),
    msg.Heartbeat(id=0),
    msg.Ended(id=7, outcome=OUTCOME, error=ERROR),
    msg.StatusRequest(id=8),
    msg.Status(
        id=8, node="n0", software="weightsync 0.1.0", pid=4711, uptime=1.5, engines=(ENGINE,),
        bridges=(
            msg.BridgeStatus(
                node="n0", index=0, pid=4712, restarts=1, slots=3, slot_bytes=4096, outstanding=0, error="killed"
            ),
        ),
        peers={"n1": "connected"},
        push=msg.PushStatus(
            model="default", version=4, state="transferring", seconds=0.1, nbytes=1000, filled_bytes=500,
            waiting_for="rank 1",
        ),
        last=OUTCOME, last_error=ERROR,
    ),
    msg.Attach(id=9, node="n0"),
    msg.Attached(
        id=9, node="n1", incarnation="abc", engines=(ENGINE,), slots=(3, 3), slot_bytes=4096, address="127.0.0.1"
    ),
    msg.Execute(
        id=10, push="p", model="default", version=3, instruction={"type": "LoadBucket", "engine": "e0", "bucket": 1},
        timeout=5.0, plan=DIGEST, manifest=b"manifest", fingerprints=b"\x02" * 8,
    ),
    msg.Executed(id=10, event={"type": "BucketLoaded", "engine": "e0", "bucket": 1}),
    msg.JoinRail(id=12, rail=0, generation=2, rank=1, world=2, host="127.0.0.1", port=29600, key="k", timeout=5.0),
    msg.Receive(id=13, push="p", bucket=1, rail=0, slot=2, ticket=b"ticket", timeout=5.0),
    msg.Release(id=0, push="p"),
    msg.ErrorReply(id=14, error=ERROR),
    msg.ChangeEngines(
        id=15, timeout=5.0,
        add=(
            EngineConfig(
                name="e2", kind="vllm", url="https://127.0.0.1:1", model="m", api_key_env="KEY", ca_file="ca.pem",
                path="plugin", target="model", gpus=("GPU-1",),
            ),
        ),
        remove=("e0",),
    ),
    msg.Changed(id=15, engines=(ENGINE,)),
    msg.Exchange(
        id=16, push="p", bucket=1, rail=0, slot=2, generation=3, token=77,
        parts=(MemberPart(root=1, runs=b"\x01" * 16),), timeout=5.0,
    ),
    msg.Gather(push="p", group="trainer-1", model="default", version=3),
    msg.RankSays(push="p", rank=9, body=b"frame", lost="it has not been heard"),
    msg.TellRank(push="p", rank=9, body=b"frame"),
    msg.Register(id=17, node="n1", endpoint="tcp://10.0.0.2:29600"),
    msg.Registered(id=17, nodes={"n1": "tcp://10.0.0.2:29600"}, complete=True),
    msg.PushLora(
        id=18, model="default", name="policy", version=12, keep=1, timeout=5.0, config=b"{}", weights=b"weights",
        forward=True,
    ),
    msg.LoraPushed(
        id=18,
        engines=(
            msg.LoraOutcome(engine="e0", node="n0", outcome="loaded"),
            msg.LoraOutcome(engine="e1", node="n1", outcome="failed", error=ERROR),
        ),
    ),
    msg.TraceRequest(id=19, model="default", failed=True),
    msg.Traced(id=19, model="default", version=3, document=b"{}"),
    msg.Prepare(
        id=20, push="p", rail=1, engines=("e0",), ranks=(0, 2), token=77, parcel=65536, turn=1, turns=2, timeout=5.0,
    ),
    msg.Collect(id=20, push="p", rail=1, generation=3, token=77, timeout=5.0),
    msg.Free(),
)  # fmt: skip
