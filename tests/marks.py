"""Marks of parameters."""

from __future__ import annotations

from typing import Any

import pytest

__all__ = ["slow"]


def slow(*values: Any) -> Any:
    """These values of a test's parameters, of which others are much alike: in `make test-all` only."""
    return pytest.param(*values, marks=pytest.mark.slow)
