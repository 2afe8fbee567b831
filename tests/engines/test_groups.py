"""What stock vLLM finds where a bridge has left word for it. To join needs GPUs: `engines.gpu_groups` does it there."""

from __future__ import annotations

import subprocess
import time

import pytest

from tests.engines.kit import ENGINES
from weightsync.nccl_bridge.meetings import VllmMeeting
from weightsync.nccl_bridge.rendezvous import Rendezvous

pytestmark = [pytest.mark.engines, pytest.mark.timeout(120)]

JOIN = """
from vllm.distributed.device_communicators.pynccl_wrapper import ncclUniqueId
from vllm.distributed.utils import StatelessProcessGroup
found = StatelessProcessGroup.create("127.0.0.1", {port}, 1, 2).broadcast_obj(None, src=0)
assert isinstance(found, ncclUniqueId), type(found)
print("found", bytes(found).hex())
"""


def test_vllms_group_without_torch_finds_the_unique_id():
    rendezvous = Rendezvous.host("127.0.0.1", deadline=time.monotonic() + 20)
    unique_id = bytes(range(128))
    VllmMeeting(rendezvous).tell(unique_id)
    command = [str(ENGINES / "vllm/bin/python"), "-c", JOIN.format(port=rendezvous.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert f"found {unique_id.hex()}" in done.stdout, done.stderr[-2000:]
