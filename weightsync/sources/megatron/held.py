"""The argument of a rule: one parameter of a Megatron model on this rank, and its place in the whole model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from weightsync.errors import SourceError
from weightsync.sources.parts import Part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

__all__ = ["Held", "Rule"]


@dataclass(frozen=True)
class Held:
    """One parameter of this rank; or one expert's share of it, if the parameter holds several experts."""

    key: str  # what rules know it by: "decoder.layers.*.mlp.experts.linear_fc1.weight"
    where: str  # the parameter's own name on this rank, for errors
    data: torch.Tensor  # its memory, or a view of it
    config: Any  # the `TransformerConfig` of its layer
    rank: int  # in the tensor-parallel group; for experts, in the expert-tensor-parallel group
    world: int  # ranks of that group
    layer: int | None = None  # of the whole model, from 0
    expert: int | None = None  # of all experts of the layer, from 0
    vocab_size: int | None = None  # rows of the checkpoint's embedding; Megatron pads its own to more

    def named(self, template: str) -> str:
        """Fill in `{layer}` and `{expert}` in a name of the checkpoint. Raises `SourceError` if one is not known."""
        known = {"layer": self.layer, "expert": self.expert}
        try:
            return template.format(**{word: number for word, number in known.items() if number is not None})
        except (KeyError, IndexError, ValueError) as error:
            raise self.error(
                f"its rule names {template!r}, and what is to stand there for {error} is not known",
                hint="{layer} is known of parameters of layers, {expert} of those of experts",
            ) from error

    def part(self, template: str, shape: tuple[int, ...], offset: tuple[int, ...], data: torch.Tensor) -> Part:
        """Make a part of `data`, which lies at `offset` in the tensor of this name and shape."""
        return Part(self.named(template), shape, offset, data)

    def error(self, problem: str, hint: str | None = None) -> SourceError:
        """Make an error that says what is wrong with this parameter."""
        return SourceError(f"Megatron parameter {self.where!r} of shape {tuple(self.data.shape)}: {problem}", hint=hint)


Rule: TypeAlias = "Callable[[Held], Iterable[Part]] | None"
"""Returns the parts of checkpoint tensors that a parameter is, as views of `held.data`. It is called again when shapes
change, not at each push. None: the parameter is no weight of the checkpoint and is left out."""
