"""Our versions in engines' own strings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightsync.adapters.versions import WeightVersion, check_marked, read, serving, updating
from weightsync.errors import EngineLost

VERSIONS = st.integers(0, 10**18 - 1)


@given(VERSIONS)
def test_what_is_served_is_read(version):
    assert read(serving(version)) == WeightVersion(version, False)


@given(VERSIONS | st.none(), VERSIONS)
def test_what_is_under_way_is_torn(old, new):
    assert read(updating(old, new)) == WeightVersion(old, True)


@pytest.mark.parametrize("text", ["default", "", "017", "-1", "1.5", "v3", None, 7, "1" * 30])
def test_anything_else_is_none_of_ours(text):
    assert read(text) == WeightVersion(None, False)


def test_an_engine_whose_own_version_was_another_name_is_still_torn():
    assert read("step-5>7") == WeightVersion(None, True)


@given(VERSIONS | st.none(), VERSIONS)
def test_the_mark_of_an_update_is_known(old, new):
    check_marked(updating(old, new), new, "e0")


@pytest.mark.parametrize("text", ["default", "17", ">16", "17>18", None])
def test_a_server_without_the_mark_is_another(text):
    with pytest.raises(EngineLost, match="was restarted"):
        check_marked(text, 17, "e0")
