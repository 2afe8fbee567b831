"""The weights of a megatron-core trainer's rank: each parameter is described as boxes of checkpoint tensors."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import nn

from weightsync.errors import SourceError
from weightsync.sources.megatron.describing import described
from weightsync.sources.megatron.exporting import Exporter
from weightsync.sources.megatron.families import FAMILIES, rules_of
from weightsync.sources.megatron.stages import Stage, bare, sync_parameters
from weightsync.sources.parts import PartSource
from weightsync.sources.recent import Recent

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    from weightsync.plan.manifest import Layout
    from weightsync.sources.megatron.held import Rule
    from weightsync.sources.megatron.views import Cut

__all__ = ["MegatronSource"]

logger = logging.getLogger(__name__)

_DTYPE, _SHAPE = attrgetter("dtype"), attrgetter("shape")


class MegatronSource(PartSource):
    """The weights of a megatron-core model, under the names and in the layout of its Hugging Face checkpoint.

    Make one on every rank for each push. Pass the model as the trainer has it, wrapped by DDP or not; a list if there
    are virtual pipeline stages. Nothing is gathered or copied, except what only a bridge can export (`gathered`).
    Parameters are read during the push, and must not change until the push has read them.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        checkpoint: str | PathLike[str] | Mapping[str, Any] | Any = None,
        *,
        family: str | None = None,
        vocab_size: int | None = None,
        rules: Mapping[str, Rule] | None = None,
        bridge: Any = None,
    ) -> None:
        """Describe what this rank holds. A model that was described lately takes milliseconds.

        checkpoint: the directory with the checkpoint's `config.json`, or what is in it: a mapping, or a transformers
            configuration. It gives family and vocab_size. Default: the bridge's.
        family: the family with the table of rules that applies, such as "qwen3"; one of `FAMILIES`.
        vocab_size: rows of the checkpoint's embedding; Megatron's has more, so that ranks share them evenly.
        rules: more rules, or others than the family's, by Megatron's name with `*` for the layer's number. Give the
            same functions each time: with new ones, everything is described anew.
        bridge: an mbridge bridge, which exports parameters that no rule knows. It gathers them at each push, among the
            ranks that share the parameter: all of these ranks must make their source.

        Raises `SourceError` naming the first parameter that cannot be pushed.
        """
        models: list[nn.Module] = [model] if isinstance(model, nn.Module) else list(model)
        if not models:
            raise SourceError("no model is given", hint="give this rank's model, or the list of its virtual stages")
        facts = _facts(checkpoint if checkpoint is not None else getattr(bridge, "hf_config", None))
        inner = list(map(bare, models))
        for one in models:
            sync_parameters(one)
        stages = list(map(Stage.of, inner))
        table = _table(family, facts.get("model_type"), rules, bridge)
        _check_tied(stages, facts)
        vocab_size = vocab_size if vocab_size is not None else facts.get("vocab_size")
        options = _Options(table, vocab_size, None if bridge is None else type(bridge))
        #: checkpoint tensors that a bridge has exported; this rank holds them whole until the source goes
        self.gathered: tuple[str, ...]
        for look in _RECENT:
            if look.fits(stages, options) and (shards := look.shards(stages, bridge)) is not None:
                _RECENT.add(look)
                self._layout, self.gathered, self._shards = look.layout, look.gathered, shards
                return
        found = described(stages, table, vocab_size, bridge)
        super().__init__(found.parts, found.aliases)
        self.gathered = found.gathered
        if self.gathered:
            logger.warning(
                "%d checkpoint tensors are gathered by %s, for want of a rule: %s",
                len(self.gathered),
                type(bridge).__name__,
                ", ".join(self.gathered[:8]) + (", …" if len(self.gathered) > 8 else ""),
            )
        if found.cuts is not None:
            _RECENT.add(_Look.of(stages, options, found.cuts, self._layout, self.gathered))


@dataclass(frozen=True)
class _Options:
    """The caller's choices."""

    table: Mapping[str, Rule]
    vocab_size: int | None
    bridge: type | None


@dataclass(frozen=True, eq=False)
class _Look:
    """Everything that a description depended on. It has only weak references to modules, and no tensor."""

    modules: tuple[ref[nn.Module], ...]
    options: _Options
    names: list[tuple[str, ...]]  # by stage, of its tensors; so are the lists below
    kinds: list[list[type]]
    dtypes: list[list[torch.dtype]]
    shapes: list[list[torch.Size]]
    cuts: list[list[Cut | None]]
    layout: Layout
    gathered: tuple[str, ...]

    @classmethod
    def of(
        cls,
        stages: list[Stage],
        options: _Options,
        cuts: list[list[Cut | None]],
        layout: Layout,
        gathered: tuple[str, ...],
    ) -> _Look:
        return cls(
            modules=tuple(ref(stage.model) for stage in stages),
            options=options,
            names=[stage.names for stage in stages],
            kinds=[list(map(type, stage.tensors)) for stage in stages],
            dtypes=[list(map(_DTYPE, stage.tensors)) for stage in stages],
            shapes=[list(map(_SHAPE, stage.tensors)) for stage in stages],
            cuts=cuts,
            layout=layout,
            gathered=gathered,
        )

    def fits(self, stages: list[Stage], options: _Options) -> bool:
        """Whether these are the same modules with parameters that look the same, wherever the parameters lie now."""
        if len(stages) != len(self.modules) or options != self.options:
            return False
        for i, stage in enumerate(stages):
            if self.modules[i]() is not stage.model or stage.names != self.names[i]:
                return False
            tensors = stage.tensors
            if list(map(type, tensors)) != self.kinds[i] or list(map(_DTYPE, tensors)) != self.dtypes[i]:
                return False
            if list(map(_SHAPE, tensors)) != self.shapes[i] or not all(map(torch.Tensor.is_contiguous, tensors)):
                return False
        return True

    def shards(self, stages: list[Stage], bridge: Any) -> list[torch.Tensor] | None:
        """Return the memory of each shard as it is now; None if a bridge exports other tensors than last time."""
        shards: list[torch.Tensor] = []
        with torch.no_grad():
            for stage, cuts in zip(stages, self.cuts, strict=True):
                exporter: Exporter | None = None
                for place, cut in enumerate(cuts):
                    if cut is not None:
                        shards += cut.views(stage.tensors[place])
                        continue
                    exporter = exporter or Exporter(bridge, stage)
                    for part in exporter.parts(place):
                        known = self.layout.shard(len(shards)) if len(shards) < len(self.layout) else None
                        if known is None or (known.name, known.shape) != (part.name, tuple(part.data.shape)):
                            return None
                        shards.append(part.data)
        return shards if len(shards) == len(self.layout) else None


_RECENT: Recent[_Look] = Recent()


def _facts(checkpoint: Any) -> Mapping[str, Any]:
    """Return a checkpoint's configuration. Raises `SourceError` if it cannot be read."""
    if checkpoint is None:
        return {}
    if isinstance(checkpoint, Mapping):
        return checkpoint
    if hasattr(checkpoint, "to_dict"):
        facts: Mapping[str, Any] = checkpoint.to_dict()
        return facts
    path = Path(checkpoint) / "config.json"
    try:
        read = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SourceError(
            f"cannot read {path}: {error}", hint="give a checkpoint's directory, or its configuration"
        ) from error
    if not isinstance(read, dict):
        raise SourceError(f"{path} must hold a JSON object")
    return read


def _table(
    family: str | None, model_type: str | None, rules: Mapping[str, Rule] | None, bridge: Any
) -> Mapping[str, Rule]:
    """Return the rules that apply. The caller's take precedence over the family's."""
    if family is None and (model_type in FAMILIES or (rules is None and bridge is None)):
        family = model_type
        if family is None:
            raise SourceError(
                "the model's family is not known, nor are rules given",
                hint="give the checkpoint's directory or configuration, family=, or rules=",
            )
    known: Mapping[str, Rule] = {} if family is None else rules_of(family)
    return known if rules is None else {**known, **rules}


def _check_tied(stages: list[Stage], facts: Mapping[str, Any]) -> None:
    said = facts.get("tie_word_embeddings")
    if said is not None and bool(said) != stages[0].tied:
        raise SourceError(
            f"the checkpoint says tie_word_embeddings = {bool(said)}, the Megatron model says "
            f"share_embeddings_and_output_weights = {stages[0].tied}",
            hint="an engine would take the wrong tensor for its output layer: make both the same",
        )
