"""Find which parameter of vLLM's model takes each pushed tensor, and which layers would be half-loaded. Pure.

vLLM fuses and renames while it loads. It reports a tensor that it could not place only when the model is half new. It
fills the rest of a layer that came in part with uninitialised memory. So workers look for both before the first byte,
with the model's own tables of renamings (`hf_to_vllm_mapper`) and fusions (`packed_modules_mapping`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

__all__ = ["Fit", "ModelNames"]

_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<index>\d+)\.(?P<member>\w+)\.(?P<leaf>.+)")
_STACKED = {"gate_proj": "w13", "up_proj": "w13", "w1": "w13", "w3": "w13", "down_proj": "w2", "w2": "w2"}
_SKIPPED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", ".kv_scale")
_PLAIN = (".weight", ".bias")


class Fit(NamedTuple):
    """The result of `ModelNames.fit`."""

    unknown: tuple[str, ...]  # tensors that no parameter takes
    partial: tuple[str, ...]  # a sentence for each layer that would be left half-loaded
    untouched: tuple[str, ...]  # parameters that no tensor goes into


class ModelNames:
    """Finds the parameters of one model by checkpoint names.

    `parameters` are all names, tied ones included; `tied` maps a name to the one whose memory it shares. `fused` is
    vLLM's `packed_modules_mapping`. `rename` is its `hf_to_vllm_mapper` for one name; None means that the model drops
    the tensor.
    """

    def __init__(
        self,
        parameters: Iterable[str],
        *,
        fused: Mapping[str, Sequence[str]],
        rename: Callable[[str], str | None] | None = None,
        tied: Mapping[str, str] | None = None,
        experts: int = 0,
    ) -> None:
        self._parameters = dict.fromkeys(parameters)
        self._fused = fused
        self._fused_of = {member: module for module, members in fused.items() for member in members}
        self._rename = rename
        self.tied = dict(tied or {})
        self._experts = experts
        self._stacked = {
            (name.rpartition(".experts.")[0] + ".experts", kind, leaf): name
            for name in self._parameters
            if ".experts." in name
            for kind, leaf in [_stack_of(name)]
        }

    def parameter_of(self, name: str) -> str | None:
        """Return the parameter that takes tensor `name`; "" if the model drops it on purpose, None if none fits."""
        if name.endswith(_SKIPPED):
            return ""
        for candidate in dict.fromkeys((self._renamed(name), name)):
            if candidate is None:
                return ""
            if found := self._place(candidate):
                return found
        return None

    def fit(self, names: Sequence[str], *, whole: bool = True) -> Fit:
        """Say how these tensors fit. Without `whole`, no name counts as unknown.

        `whole` is False if this worker has only some of the model's layers (pipeline parallelism): other workers may
        know the name.
        """
        places = {name: self.parameter_of(name) for name in names}
        taken: dict[str, list[str]] = {}
        for name, parameter in places.items():
            if parameter:
                taken.setdefault(self.tied.get(parameter, parameter), []).append(name)
        unknown = tuple(name for name, parameter in places.items() if parameter is None) if whole else ()
        untouched = tuple(name for name in self._parameters if self.tied.get(name, name) not in taken)
        return Fit(unknown, tuple(self._partial(taken)), untouched)

    def _partial(self, taken: Mapping[str, Sequence[str]]) -> Iterable[str]:
        for parameter, names in taken.items():
            module, _, leaf = parameter.rpartition(".")
            fused = self._fused.get(module.rpartition(".")[2])
            if fused and len(members := _members(names, fused)) < len(fused):
                lacking = ", ".join(member for member in fused if member not in members)
                yield f"{names[0]!r} comes without {lacking} of the same fused {parameter!r}"
            if ".experts." in parameter and self._experts:
                indices = {found["index"] for name in names if (found := _EXPERT.match(name))}
                if indices and len(indices) < self._experts:
                    yield f"{len(indices)} of {self._experts} experts of {parameter!r}"
            other = f"{module}.{'bias' if leaf == 'weight' else 'weight'}"
            if f".{leaf}" in _PLAIN and other in self._parameters and other not in taken:
                yield f"{names[0]!r} comes without {other!r}"

    def _renamed(self, name: str) -> str | None:
        return self._rename(name) if self._rename is not None else name

    def _place(self, name: str) -> str | None:
        if name in self._parameters:
            return name
        if found := _EXPERT.fullmatch(name):
            kind = _STACKED.get(found["member"])
            return self._stacked.get((found["experts"], kind, found["leaf"])) if kind else None
        parts = name.split(".")
        for back in (-2, -3):
            if len(parts) >= -back and (fused := self._fused_of.get(parts[back])):
                candidate = ".".join((*parts[:back], fused, *parts[back + 1 :]))
                if candidate in self._parameters:
                    return candidate
        return None


def _stack_of(parameter: str) -> tuple[str, str]:
    kind, _, leaf = parameter.rpartition(".")[2].partition("_")
    return kind, leaf


def _members(names: Sequence[str], fused: Sequence[str]) -> set[str]:
    """Return the members of a fused module that the tensors are; all of them if their names do not tell."""
    found = {part for name in names for part in name.split(".")[-3:] if part in fused}
    return found or set(fused)  # the tensor came fused already, or under other names
