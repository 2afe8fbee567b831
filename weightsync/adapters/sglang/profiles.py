"""Choose the dialect of SGLang's weight endpoints that a server speaks. Pure, from its version and its endpoints.

The version says what to expect, and `/openapi.json` says whether it is there. A version newer than those read gets the
newest profile whose paths and request fields it has. A server that lacks some of them is refused with one sentence
instead of failing half-way through a push.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from weightsync.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["OLDEST", "PROFILES", "Chosen", "Profile", "Surface", "choose", "numbers_of", "surface_of"]

_TENSOR = "/update_weights_from_tensor"
_NUMBERS = re.compile(r"(\d+)\.(\d+)\.(\d+)(?:\.post(\d+))?")

_COMMON_PATHS = (
    "/server_info",
    "/model_info",
    "/pause_generation",
    "/continue_generation",
    "/flush_cache",
    "/update_weight_version",
    _TENSOR,
)
_COMMON_FIELDS = {
    _TENSOR: ("serialized_named_tensors", "load_format", "flush_cache"),
    "/pause_generation": ("mode",),
    "/update_weight_version": ("new_version", "abort_all_requests"),
}


@dataclass(frozen=True)
class Surface:
    """A server's paths and, where they are known, the fields of each path's request body."""

    paths: frozenset[str]
    fields: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def lacks(self, path: str, name: str) -> bool:
        """Whether the request of `path` is known not to have the field `name`."""
        return path in self.fields and name not in self.fields[path]


@dataclass(frozen=True)
class Profile:
    """One dialect, and the versions that speak it."""

    name: str
    first: tuple[int, ...]
    last: tuple[int, ...]  # the newest version that was read; later ones get the newest profile that fits
    sessions: bool  # tensors are loaded only between /begin_weight_update and /end_weight_update
    draft: Literal["none", "disable_draft_model", "selector"]  # the field that says which model takes the tensors
    flushes_queued: bool  # the cache can be flushed while retracted requests are queued
    plugins: bool  # the server loads `sglang.srt.plugins` entry points
    ran: tuple[str, ...]  # versions that pushes were run against; of the others only the source was read
    paths: tuple[str, ...] = ()
    fields: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def verified(self) -> str:
        """Say, for operators, how this dialect was verified."""
        return f"run against {', '.join(self.ran)}" if self.ran else "from its source only"

    def missing(self, surface: Surface) -> list[str]:
        """List the paths and fields of this profile that a server lacks."""
        lacking = [path for path in (*_COMMON_PATHS, *self.paths) if path not in surface.paths]
        for needs in (_COMMON_FIELDS, self.fields):
            lacking += [
                f"{name} in {path}"
                for path, names in needs.items()
                for name in names
                if path in surface.paths and surface.lacks(path, name)
            ]
        return lacking


PROFILES = (
    Profile(
        name="sglang-session",
        first=(0, 5, 21),
        last=(0, 5, 23),
        sessions=True,
        draft="selector",
        flushes_queued=True,
        plugins=True,
        ran=("0.5.23 on a CPU",),
        paths=("/begin_weight_update", "/end_weight_update"),
        fields={_TENSOR: ("selector",), "/begin_weight_update": ("selector",)},
    ),
    Profile(
        name="sglang-legacy",
        first=(0, 5, 12),
        last=(0, 5, 20),
        sessions=False,
        draft="disable_draft_model",
        flushes_queued=False,
        plugins=True,
        ran=("0.5.15.post1 and 0.5.20 on a CPU", "0.5.17 on H200 GPUs"),
        fields={_TENSOR: ("disable_draft_model",)},
    ),
    Profile(
        name="sglang-legacy-0.5.9",
        first=(0, 5, 9),
        last=(0, 5, 11),
        sessions=False,
        draft="none",
        flushes_queued=True,
        plugins=False,
        ran=(),
    ),
)
"""Newest first."""

OLDEST = ".".join(map(str, PROFILES[-1].first))


@dataclass(frozen=True)
class Chosen:
    """A profile, and the sentence that says why it was chosen."""

    profile: Profile
    why: str


def choose(version: str, surface: Surface) -> Chosen:
    """Choose the profile for a server of `version` with `surface`. Raises `EngineError` if none fits.

    A version without numbers, such as that of a build from a checkout, is judged by its surface alone.
    """
    numbers = numbers_of(version)
    candidates = [profile for profile in PROFILES if numbers is None or profile.first <= numbers]
    if not candidates:
        raise EngineError(f"SGLang {version} is older than any that is supported", hint=f"SGLang {OLDEST} or later")
    if numbers is not None and numbers[:3] <= PROFILES[0].last:
        del candidates[1:]  # a version that was read speaks its own dialect or none
    for profile in candidates:
        if not profile.missing(surface):
            return Chosen(profile, _why(profile, version, numbers))
    lacking = candidates[0].missing(surface)
    raise EngineError(
        f"SGLang {version} should speak the dialect {candidates[0].name!r}, and lacks {', '.join(lacking[:6])}"
        + (f" and {len(lacking) - 6} more" if len(lacking) > 6 else ""),
        hint="an unpatched SGLang, started as an HTTP server of its own (no router, no gRPC mode)",
    )


def surface_of(openapi: Any) -> Surface | None:
    """Read the surface out of an `/openapi.json`; None if it is no such document."""
    if not isinstance(openapi, dict) or not isinstance(openapi.get("paths"), dict):
        return None
    schemas = openapi.get("components", {}).get("schemas", {})
    fields: dict[str, frozenset[str]] = {}
    for path, methods in openapi["paths"].items():
        try:
            schema = methods["post"]["requestBody"]["content"]["application/json"]["schema"]
            properties = schemas[schema["$ref"].rpartition("/")[2]]["properties"]
        except (KeyError, TypeError, AttributeError):
            continue  # no body, or not a plain reference: its fields stay unknown
        fields[path] = frozenset(properties)
    return Surface(frozenset(openapi["paths"]), fields)


def numbers_of(version: str) -> tuple[int, ...] | None:
    """Parse "0.5.23" to `(0, 5, 23)`, "0.5.15.post1" to `(0, 5, 15, 1)`; None for 0.0.0 or anything else."""
    match = _NUMBERS.match(version)
    if match is None or match.group(1, 2, 3) == ("0", "0", "0"):
        return None
    return tuple(int(number) for number in match.groups() if number is not None)


def _why(profile: Profile, version: str, numbers: tuple[int, ...] | None) -> str:
    first, last = (".".join(map(str, end)) for end in (profile.first, profile.last))
    if numbers is None:
        reason = f"{version}, which says nothing: chosen by its endpoints"
    elif numbers[:3] > profile.last:
        reason = f"{version} > {last}, the newest that was read: chosen by its endpoints"
    else:
        reason = f"{version} ≥ {first}"
    return f"{profile.name} ({reason}; {profile.verified})"
