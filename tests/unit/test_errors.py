"""Errors as records: of whom they speak."""

from __future__ import annotations

import pytest

from weightsync.errors import ErrorRecord


@pytest.mark.parametrize(
    ("name", "message", "told"),
    [
        ("e0", "engine e0 restarted during the push", "engine e0 restarted during the push"),
        (
            "e0",
            "cannot determine which GPUs engine e0's 2 ranks use",
            "cannot determine which GPUs engine e0's 2 ranks use",
        ),
        ("e0", "the workers of e0 contradict themselves", "the workers of e0 contradict themselves"),
        ("e0", "engine e01 restarted", "e0: engine e01 restarted"),
        ("e0", "engine e0.b restarted", "e0: engine e0.b restarted"),
        ("vllm", "stock vllm takes whole tensors", "vllm: stock vllm takes whole tensors"),
        (
            "engine",
            "'w' in the engine differs from what the trainer sent",
            "engine: 'w' in the engine differs from what the trainer sent",
        ),
    ],
)
def test_among_those_of_several_engines_a_sentence_says_whose_it_is(name, message, told):
    assert ErrorRecord(kind="EngineError", message=message).of_engine(name) == told
