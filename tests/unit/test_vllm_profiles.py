"""Which protocol a vLLM server speaks, by its version and its routes."""

from __future__ import annotations

from itertools import pairwise

import pytest

from weightsync.adapters.vllm.profiles import DEV_ROUTES, PROFILES, choose, release
from weightsync.errors import EngineError

# what the wheels' own routers have, as read out of each
ROUTES_019 = {*DEV_ROUTES, "/resume", "/init_weight_transfer_engine", "/update_weights", "/server_info", "/sleep"}
ROUTES_021 = {*ROUTES_019, "/start_weight_update", "/finish_weight_update"}
ROUTES_026 = {*ROUTES_021, "/abort_requests", "/start_draft_weight_update"}
ROUTES_027 = {*ROUTES_026, "/weight_info", "/update_weight_version"}
ROUTES_032 = {*ROUTES_027, "/release_kv_cache_memory", "/weight_checker", "/shutdown_weight_transfer_engine"}


@pytest.mark.parametrize(
    ("version", "routes", "name"),
    [
        ("0.19.1", ROUTES_019, "vllm-0.19"),
        ("0.20.2", ROUTES_019, "vllm-0.19"),
        ("0.21.0", ROUTES_021, "vllm-0.21"),
        ("0.22.1", ROUTES_021, "vllm-0.22"),
        ("0.24.0", ROUTES_021, "vllm-0.23"),
        ("0.25.1", ROUTES_021, "vllm-0.25"),
        ("0.26.0", ROUTES_026, "vllm-0.26"),
        ("0.28.0", ROUTES_027, "vllm-0.27"),
        ("0.29.0", ROUTES_027, "vllm-0.29"),
        ("0.32.0", ROUTES_032, "vllm-0.29"),
        ("0.33.1rc2.dev7+g1a2b3c4", ROUTES_032, "vllm-0.29"),
    ],
)
def test_known_releases(version, routes, name):
    assert choose(version, routes, engine="e").profile.name == name


def test_profiles_follow_each_other_without_a_gap():
    for before, after in pairwise(PROFILES):
        assert after.first == (before.last[0], before.last[1] + 1)


def test_features_of_the_oldest_and_the_newest():
    oldest, newest = PROFILES[0], PROFILES[-1]
    assert not oldest.brackets
    assert not oldest.custom_backend
    assert oldest.packed is None
    assert newest.per_worker
    assert newest.keeps_version
    assert newest.packed == "init"
    assert newest.verified == "run against 0.32.0 on CPU"


def test_newer_than_known_gets_the_newest_profile_that_fits():
    choice = choose("0.41.0", ROUTES_032, engine="e")
    assert choice.profile is PROFILES[-1]
    assert "newer than any known" in choice.why


def test_no_release_number_goes_by_routes():
    assert choose("dev", ROUTES_021, engine="e").profile.name == "vllm-0.25"
    assert choose("dev", ROUTES_032, engine="e").profile is PROFILES[-1]


def test_newer_without_its_routes_says_what_is_missing():
    with pytest.raises(EngineError, match="has no /init_weight_transfer_engine, /update_weights"):
        choose("0.41.0", DEV_ROUTES, engine="e")


def test_production_mode_is_named():
    with pytest.raises(EngineError, match="answers 404 to /pause") as caught:
        choose("0.32.0", {"/version", "/health"}, engine="e")
    assert "VLLM_SERVER_DEV_MODE=1" in (caught.value.hint or "")


def test_a_release_without_its_own_routes_is_refused():
    with pytest.raises(EngineError, match="has no /weight_info"):
        choose("0.32.0", ROUTES_026, engine="e")


def test_too_old():
    with pytest.raises(EngineError, match="too old"):
        choose("0.18.1", ROUTES_019, engine="e")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0.32.0", (0, 32)), ("v0.22", (0, 22)), ("0.32.1rc1", (0, 32)), ("dev", None), ("", None), ("1", None)],
)
def test_release(text, expected):
    assert release(text) == expected
