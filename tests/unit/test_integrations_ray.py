"""Ranks that no launcher started, as Ray's actors: how they recognise each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

RANK = """
import json, os, sys
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg
from weightsync.errors import WeightSyncError
from weightsync.trainer.place import trainer_place

rank, cases = int(sys.argv[1]), json.loads(sys.argv[2])
told = {}
for name, (method, trainer) in cases.items():
    given = {"init_method": method} if method else {"store": dist.HashStore()}
    dist.init_process_group("gloo" if method else "fake", rank=rank, world_size=2, **given)
    os.environ["WEIGHTSYNC_TRAINER"] = trainer
    try:
        place = trainer_place()
        told[name] = [place.group, place.rank, place.world]
    except WeightSyncError as error:
        told[name] = str(error)
    dist.barrier()  # the other rank may still be connecting
    dist.destroy_process_group()
print(json.dumps(told))
"""
LAUNCH = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two processes says that were given nothing but where to meet, for several such places."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    directory = tmp_path_factory.mktemp("stores")
    cases = {
        "tcp": (f"tcp://127.0.0.1:{port}", ""),
        "file": (f"file://{directory}/one", ""),
        "other": (f"file://{directory}/two", ""),
        "named": (f"file://{directory}/three", "run-7"),
        "nowhere": ("", ""),
        "nowhere, named": ("", "run-7"),
    }
    env = {name: value for name, value in os.environ.items() if name not in LAUNCH}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), json.dumps(cases)], env=env, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        return [json.loads(rank.communicate(timeout=50)[0].splitlines()[-1]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate(timeout=10)


@pytest.mark.parametrize("where", ["tcp", "file", "named", "nowhere, named"])
def test_ranks_that_no_launcher_started_know_each_other(places, where):
    (group, *first), (other, *second) = (told[where] for told in places)
    assert group == other
    assert (first, second) == ([0, 2], [1, 2])


def test_trainers_that_met_elsewhere_are_others(places):
    assert len({places[0][where][0] for where in ("tcp", "file", "other", "named")}) == 4


def test_ranks_that_met_nowhere_are_told_what_to_set(places):
    for told in places:
        assert "HashStore" in told["nowhere"]
        assert "set the same WEIGHTSYNC_TRAINER" in told["nowhere"]
