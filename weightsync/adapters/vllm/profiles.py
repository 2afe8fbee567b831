"""Choose which of vLLM's weight-update protocols a server speaks. Pure.

The protocol changed with nearly every release. A profile says what one range of releases has; the list below was read
out of the wheels, release by release. The version selects the profile, and the server's routes must confirm it. A build
with another version string, or newer than all profiles, gets the newest profile whose routes are all there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from weightsync.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["DEV_ROUTES", "MARK", "PROFILES", "PROTOCOL", "Choice", "Profile", "choose", "release"]

PROTOCOL = 4
"""Protocol of the calls to our own plugin. Daemon and engine must have the same, or no push begins."""

MARK = "weightsync_is_here"  # attribute that our plugin sets on a worker's wrapper, whose `__dir__` then lists it
DEV_ROUTES = ("/pause", "/resume", "/is_paused", "/get_world_size", "/reset_prefix_cache", "/collective_rpc")
"""Routes that every version has, but only in development mode."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The protocol of the releases from `first` to `last`, both included."""

    first: tuple[int, int]
    last: tuple[int, int]
    brackets: bool = False  # updates lie between start_weight_update and finish_weight_update
    custom_backend: bool = False  # weight_transfer_config takes the name of a registered backend
    engine_reloads: bool = False  # the backend opens and closes the layerwise reload; before, vLLM's worker did
    packed: Literal["init", "update"] | None = None  # the call that tells stock ipc that buffers are packed
    draft: bool = False  # has start_draft_weight_update
    keeps_version: bool = False  # has weight_info, update_weight_version, and a version in finish_weight_update
    per_worker: bool = False  # update_info may be a list with an entry for each worker
    verified: str = "from source only"

    @property
    def name(self) -> str:
        """A name after the first release that speaks it, such as `vllm-0.27`."""
        return f"vllm-{self.first[0]}.{self.first[1]}"

    @property
    def routes(self) -> tuple[str, ...]:
        """The routes that a server of this profile must have."""
        own = []
        if self.brackets:
            own += ["/start_weight_update", "/finish_weight_update"]
        if self.draft:
            own += ["/start_draft_weight_update"]
        if self.keeps_version:
            own += ["/weight_info", "/update_weight_version"]
        return (*DEV_ROUTES, "/init_weight_transfer_engine", "/update_weights", *own)


PROFILES: tuple[Profile, ...] = (
    Profile(first=(0, 19), last=(0, 20)),
    Profile(first=(0, 21), last=(0, 21), brackets=True),
    Profile(first=(0, 22), last=(0, 22), brackets=True, custom_backend=True, packed="update"),
    Profile(first=(0, 23), last=(0, 24), brackets=True, custom_backend=True, packed="update"),
    Profile(first=(0, 25), last=(0, 25), brackets=True, custom_backend=True, engine_reloads=True, packed="update"),
    Profile(
        first=(0, 26),
        last=(0, 26),
        brackets=True,
        custom_backend=True,
        engine_reloads=True,
        packed="update",
        draft=True,
        verified="run against 0.26.0 on H200 GPUs",
    ),
    Profile(
        first=(0, 27),
        last=(0, 28),
        brackets=True,
        custom_backend=True,
        engine_reloads=True,
        packed="init",
        draft=True,
        keeps_version=True,
        verified="run against 0.27.1 on CPU",
    ),
    Profile(
        first=(0, 29),
        last=(0, 33),
        brackets=True,
        custom_backend=True,
        engine_reloads=True,
        packed="init",
        draft=True,
        keeps_version=True,
        per_worker=True,
        verified="run against 0.32.0 on CPU",
    ),
)


@dataclass(frozen=True)
class Choice:
    """A profile, and why it was chosen."""

    profile: Profile
    why: str


def release(version: str) -> tuple[int, int] | None:
    """Parse "0.32.0", "0.32.1rc1.dev3+gabc" and the like to `(0, 32)`; None if it begins with no release number."""
    found = re.match(r"v?(\d{1,4})\.(\d{1,4})(?:\D|$)", version)
    return (int(found[1]), int(found[2])) if found else None


def choose(version: str, routes: Collection[str], *, engine: str) -> Choice:
    """Choose the profile of a server that calls itself `version` and has `routes`.

    Raises `EngineError` saying what is missing if no profile fits.
    """
    if missing := [route for route in DEV_ROUTES if route not in routes]:
        raise EngineError(
            f"vllm {version} answers 404 to {', '.join(missing)}",
            engine=engine,
            phase="probe",
            hint="start it with VLLM_SERVER_DEV_MODE=1 in its environment, on a loopback address: nothing guards these "
            "routes",
        )
    number = release(version)
    for profile in PROFILES:
        if number is not None and profile.first <= number <= profile.last:
            if absent := [route for route in profile.routes if route not in routes]:
                raise EngineError(
                    f"vllm {version} has no {', '.join(absent)}, which {profile.name} has",
                    engine=engine,
                    phase="probe",
                    hint="a plain vllm server of version 0.19 or later",
                )
            return Choice(profile, f"{version} is of {_span(profile)}, {profile.verified}")
    if number is not None and number < PROFILES[0].first:
        raise EngineError(
            f"vllm {version} is too old to take weights while it runs",
            engine=engine,
            phase="probe",
            hint="vllm 0.19 or later",
        )
    for profile in reversed(PROFILES):
        if all(route in routes for route in profile.routes):
            kind = "newer than any known here" if number is not None else "no release number"
            return Choice(profile, f"{version} is {kind}; it has every route of {_span(profile)}")
    absent = [route for route in PROFILES[0].routes if route not in routes]
    raise EngineError(
        f"vllm {version} is unknown here and has no {', '.join(absent)}",
        engine=engine,
        phase="probe",
        hint=f"a version from 0.19 to {PROFILES[-1].last[0]}.{PROFILES[-1].last[1]}",
    )


def _span(profile: Profile) -> str:
    (major, first), (_, last) = profile.first, profile.last
    return f"{major}.{first}" if first == last else f"{major}.{first} to {major}.{last}"
