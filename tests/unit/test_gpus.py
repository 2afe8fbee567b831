"""What a process sees of the machine's GPUs."""

from __future__ import annotations

import pytest

from weightsync.errors import ConfigError
from weightsync.gpus import seen_by

GPUS = ["aa11", "aa22", "bb33"]


@pytest.mark.parametrize(
    ("wanted", "seen"),
    [
        (None, GPUS),
        ("", []),
        ("2,0", ["bb33", "aa11"]),
        ("GPU-bb33", ["bb33"]),
        ("GPU-bb,1", ["bb33", "aa22"]),
        ("0,7,1", ["aa11"]),
        ("GPU-aa", []),
        ("-1", []),
    ],
)
def test_by_cudas_rules(wanted, seen):
    environment = {} if wanted is None else {"CUDA_VISIBLE_DEVICES": wanted}
    assert seen_by(environment, GPUS) == seen


def test_instances_of_a_gpu_are_refused():
    with pytest.raises(ConfigError, match="MIG-1"):
        seen_by({"CUDA_VISIBLE_DEVICES": "MIG-1"}, GPUS)
