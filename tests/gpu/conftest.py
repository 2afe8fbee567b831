"""Tests on real GPUs: `make test-gpu` on a machine that has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if HERE in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.gpu)
        elsewhere = getattr(getattr(item, "module", None), "DEVICE", "cuda") == "cpu"  # of a module that can do without
        if not torch.cuda.is_available() and not elsewhere:
            item.add_marker(pytest.mark.skip(reason="this machine has no GPU"))


@pytest.fixture(scope="session")
def gpus() -> int:
    return torch.cuda.device_count()
