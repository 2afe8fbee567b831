"""Judge a manifest before anything is touched: tensors the engine cannot take, and tensors left as they are. Pure."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, NamedTuple

from weightsync.adapters.reference.sharding import EMBED, HEAD, checkpoint_tensors, dtype_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from weightsync.adapters.reference.config import ModelConfig
    from weightsync.plan.manifest import Manifest

__all__ = ["Verdict", "admit", "held_names"]

_SUGGESTIONS = 3  # looking for a similar name among thousands costs tens of milliseconds


class Verdict(NamedTuple):
    """The result of `admit`."""

    problems: tuple[str, ...]  # each names a tensor and what is expected; empty: the manifest can be taken
    untouched: tuple[str, ...]  # names that the engine holds and the manifest leaves alone


def held_names(config: ModelConfig, manifest: Manifest) -> dict[str, str]:
    """Map each pushed name to the engine's name for it.

    They differ in one case: a tied model's only matrix, pushed as the head with the embedding as its alias.
    """
    names = {name: name for name in manifest.tensors.names}
    if config.tie_word_embeddings and (EMBED, HEAD) in manifest.tensors.aliases:
        names[HEAD] = EMBED
    return names


def admit(config: ModelConfig, manifest: Manifest, required: Collection[str]) -> Verdict:
    """Judge whether an engine of `config` can take `manifest`, which must bring every name in `required`."""
    known = checkpoint_tensors(config)
    table = manifest.tensors
    held = held_names(config, manifest)
    problems: list[str] = []
    suggestions = 0
    for name, dtype, shape in zip(table.names, table.dtypes, table.shapes, strict=True):
        expected = known.get(held[name])
        if expected is None:
            if name == HEAD:
                problems.append(f"{name}: this model ties it to {EMBED}; push it as an alias of that")
                continue
            suggestions += 1
            near = get_close_matches(name, known, n=1) if suggestions <= _SUGGESTIONS else []
            problems.append(f"{name}: this engine has no such tensor" + (f"; it has {near[0]}" if near else ""))
            continue
        if tuple(shape) != expected:
            problems.append(f"{name}: shape {list(shape)}, but this engine's is {list(expected)}")
        if dtype != dtype_of(config, held[name]):
            problems.append(f"{name}: dtype {dtype}, but this engine's is {dtype_of(config, held[name])}")
    if not config.tie_word_embeddings and HEAD not in table.index and any(other == HEAD for other, _ in table.aliases):
        problems.append(f"{HEAD}: pushed as an alias, but this engine holds it apart; push it as a tensor of its own")
    brought = set(held.values())
    problems += [
        f"{name}: not in this push, but the engine holds no whole version of it; push it too"
        for name in known
        if name in required and name not in brought
    ]
    return Verdict(tuple(problems), tuple(name for name in known if name not in brought))
