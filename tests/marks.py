"""Marks of parameters."""

from __future__ import annotations

from typing import Any

import pytest

__all__ = ["slow"]


def slow(*values: Any) -> Any:
    """Mark these parameters as much like others: tested in `make test-all` only."""
    return pytest.param(*values, marks=pytest.mark.slow)
