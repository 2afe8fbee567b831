"""Which dialect of SGLang is spoken: by versions that were read, by others, and by servers that lack things."""

from __future__ import annotations

import pytest

from weightsync.adapters.sglang.profiles import PROFILES, Surface, choose, surface_of
from weightsync.errors import EngineError

PATHS = frozenset(
    {
        "/server_info",
        "/model_info",
        "/pause_generation",
        "/continue_generation",
        "/flush_cache",
        "/update_weight_version",
        "/update_weights_from_tensor",
    }
)
SESSIONS = PATHS | {"/begin_weight_update", "/end_weight_update"}
TENSOR = frozenset({"serialized_named_tensors", "load_format", "flush_cache", "weight_version"})
NEW = Surface(SESSIONS, {"/update_weights_from_tensor": TENSOR | {"selector"}})
MIDDLE = Surface(PATHS, {"/update_weights_from_tensor": TENSOR | {"disable_draft_model"}})
OLD = Surface(PATHS, {"/update_weights_from_tensor": TENSOR})


@pytest.mark.parametrize(
    ("version", "surface", "name"),
    [
        ("0.5.9", OLD, "sglang-legacy-0.5.9"),
        ("0.5.11", OLD, "sglang-legacy-0.5.9"),
        ("0.5.12", MIDDLE, "sglang-legacy"),
        ("0.5.15.post1", MIDDLE, "sglang-legacy"),
        ("0.5.20", MIDDLE, "sglang-legacy"),
        ("0.5.21", NEW, "sglang-session"),
        ("0.5.23", NEW, "sglang-session"),
        ("0.5.23", Surface(SESSIONS), "sglang-session"),  # no openapi: its paths are all that is known
    ],
)
def test_the_profile_of_a_version(version: str, surface: Surface, name: str) -> None:
    chosen = choose(version, surface)
    assert chosen.profile.name == name
    assert chosen.why.startswith(f"{name} ({version} ≥ ")
    assert chosen.profile.verified in chosen.why


def test_a_newer_version_gets_the_newest_profile_that_fits() -> None:
    chosen = choose("0.7.1rc0", NEW)
    assert chosen.profile is PROFILES[0]
    assert "0.7.1rc0 > 0.5.23, the newest that was read" in chosen.why


@pytest.mark.parametrize(("surface", "name"), [(NEW, "sglang-session"), (MIDDLE, "sglang-legacy")])
def test_a_build_without_a_version_is_judged_by_its_endpoints(surface: Surface, name: str) -> None:
    chosen = choose("0.0.0.dev1+gabcdef", surface)
    assert chosen.profile.name == name
    assert "chosen by its endpoints" in chosen.why


def test_a_server_that_lacks_something_is_refused_by_name() -> None:
    with pytest.raises(
        EngineError, match=r"'sglang-session', and lacks /pause_generation, /begin_weight_update"
    ) as info:
        choose("0.6.0", Surface(PATHS - {"/pause_generation"}))
    assert info.value.hint is not None


def test_a_missing_field_is_named_with_its_path() -> None:
    surface = Surface(SESSIONS, {"/update_weights_from_tensor": frozenset({"serialized_named_tensors"})})
    with pytest.raises(EngineError, match=r"lacks load_format in /update_weights_from_tensor, flush_cache in "):
        choose("0.5.23", surface)


def test_a_version_that_was_read_is_not_taken_for_an_older_one() -> None:
    with pytest.raises(
        EngineError, match="'sglang-legacy', and lacks disable_draft_model in /update_weights_from_tensor"
    ):
        choose("0.5.13", OLD)


def test_too_old() -> None:
    with pytest.raises(EngineError, match=r"SGLang 0\.5\.8 is older"):
        choose("0.5.8", OLD)


def test_the_surface_of_an_openapi_document() -> None:
    body = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Req"}}}}
    document = {
        "paths": {"/a": {"post": {"requestBody": body}}, "/b": {"get": {}}, "/c": {"post": {"requestBody": {}}}},
        "components": {"schemas": {"Req": {"properties": {"x": {}, "y": {}}}}},
    }
    surface = surface_of(document)
    assert surface == Surface(frozenset({"/a", "/b", "/c"}), {"/a": frozenset({"x", "y"})})
    assert surface.lacks("/a", "z")
    assert not surface.lacks("/b", "z")


@pytest.mark.parametrize("document", [None, "Not Found", [], {}, {"paths": []}])
def test_no_openapi_document(document: object) -> None:
    assert surface_of(document) is None
