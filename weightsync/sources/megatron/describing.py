"""Describes a model from the start: each parameter by its rule, or by an mbridge bridge if it has no rule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsync.errors import SourceError
from weightsync.sources.megatron.exporting import Exporter
from weightsync.sources.megatron.families import EMBEDDING, OUTPUT
from weightsync.sources.megatron.rules import Vocabulary
from weightsync.sources.megatron.stages import held_of
from weightsync.sources.megatron.views import Cut
from weightsync.sources.parts import Part

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightsync.sources.megatron.held import Held, Rule
    from weightsync.sources.megatron.stages import Stage

__all__ = ["Described", "described"]


@dataclass
class Described:
    """What this rank holds, and how it was cut."""

    parts: list[Part]
    aliases: list[tuple[str, str]]
    gathered: tuple[str, ...]  # tensors that a bridge has exported
    cuts: list[list[Cut | None]] | None  # by stage and tensor, None if a bridge exports it; None if a rule made a copy


def described(stages: list[Stage], table: Mapping[str, Rule], vocab_size: int | None, bridge: Any) -> Described:
    """Describe what this rank holds of these stages.

    Raises `SourceError` naming the first parameter that no rule knows, or that is not as its rule says.
    """
    result = Described([], [], (), [])
    for stage in stages:
        exporter: Exporter | None = None
        own: list[list[Part]] = [[] for _ in stage.tensors]
        exported = set()
        for place, held in held_of(stage, vocab_size):
            if held.key == OUTPUT and stage.tied:
                continue  # the last stage's copy; the first stage's is sent
            if held.key in table:
                own[place] += _applied(table[held.key], held)
            elif bridge is None:
                raise _unknown(held)
            elif place not in exported:
                exporter = exporter or Exporter(bridge, stage)
                own[place] = exporter.parts(place)
                exported.add(place)
        for place, parts in enumerate(own):
            result.parts += parts
            if place in exported:
                result.gathered += tuple(part.name for part in parts)
        if stage.tied and stage.first:
            result.aliases += _tied_names(table)
        if result.cuts is not None:
            _keep_cuts(result, stage, own, exported)
    return result


def _keep_cuts(result: Described, stage: Stage, own: list[list[Part]], exported: set[int]) -> None:
    cuts: list[Cut | None] = []
    for place, (tensor, parts) in enumerate(zip(stage.tensors, own, strict=True)):
        cut = None if place in exported else Cut.of(tensor, [part.data for part in parts])
        if cut is None and place not in exported:
            result.cuts = None
            return
        cuts.append(cut)
    assert result.cuts is not None, "they were kept so far"
    result.cuts.append(cuts)


def _tied_names(table: Mapping[str, Rule]) -> list[tuple[str, str]]:
    output, embedding = table.get(OUTPUT), table.get(EMBEDDING)
    if isinstance(output, Vocabulary) and isinstance(embedding, Vocabulary):
        return [(output.name, embedding.name)]
    return []


def _applied(rule: Rule, held: Held) -> list[Part]:
    if rule is None:
        return []
    parts = rule(held)
    if not isinstance(parts, Iterable):
        raise held.error(f"its rule gave {type(parts).__name__}, not parts")
    parts = list(parts)
    for part in parts:
        if not isinstance(part, Part):
            raise held.error(f"its rule gave {type(part).__name__}, not weightsync.sources.Part")
    return parts


def _unknown(held: Held) -> SourceError:
    problem = f"no rule says where Megatron parameter {held.where!r} lies in the checkpoint"
    if held.key.startswith("mtp."):
        return SourceError(
            f"{problem}: no table has rules for the layers of multi-token prediction",
            hint="give rules= for them, with None for those that engines do not load; or an mbridge bridge=",
        )
    return SourceError(
        problem,
        hint=f"add one: rules={{{held.key!r}: Columns('model.layers.{{layer}}.….weight')}}, of Whole, Norm, Columns, "
        "Rows, Vocabulary, Gated, QKV or a function of yours; None leaves it out. Or give an mbridge bridge=",
    )
