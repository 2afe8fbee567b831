"""What an engine was started on says which tensors it takes, by name and shape, before it is touched.

Engines check what they load late or not at all: SGLang leaves out names it does not know with a line in its log, and
some loaders narrow a tensor of another shape until it fits. The checkpoint that a server was started on has the very
names and shapes that a trainer of the same model pushes, and where the server runs on this machine its headers can be
read here. Where they cannot, nobody is refused.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

from weightsync.errors import EngineRefused, SourceError
from weightsync.sources.safetensors_header import files_of, read_header

if TYPE_CHECKING:
    from collections.abc import Mapping

    from weightsync.plan.manifest import Manifest

__all__ = ["CheckpointCheck", "find_checkpoint", "misfits", "read_shapes"]

_SHOWN = 5


class CheckpointCheck:
    """The check for one incarnation of a server; headers are read once, when first needed."""

    def __init__(self, model: str | None, engine: str, *, silent: bool = False) -> None:
        """`model` is what the server was started on; None: not known, and nothing is checked.

        `silent`: the engine leaves out names it does not know without an error.
        """
        self._silent = silent
        self._model = model
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] | None = None

    async def refuse(self, manifest: Manifest, *, whole: str = "", sure: bool = False) -> None:
        """Raise `EngineRefused` naming the tensors that the checkpoint has no place for.

        `whole` says why only a whole model will do: then also those that are missing and, if it has to be `sure`, where
        the checkpoint cannot be read.
        """
        if self._shapes is None:
            self._shapes = await asyncio.to_thread(self._read)
        problem = misfits(manifest, self._shapes, silent=self._silent)
        if whole and not problem:
            problem = _parts(manifest, self._shapes, sure=sure)
            problem = problem and f"{whole}, so only a whole model can be loaded: {problem}"
        if problem:
            raise EngineRefused(
                problem,
                engine=self._engine,
                phase="accept",
                hint=f"names and shapes as in {self._model}, which it was started on",
            )

    def _read(self) -> dict[str, tuple[int, ...]]:
        checkpoint = find_checkpoint(self._model)
        return read_shapes(checkpoint) if checkpoint is not None else {}


def find_checkpoint(model: str | None) -> Path | None:
    """The folder that a server's model stands for: a path, or a name in the Hugging Face cache; None: not here."""
    if not model:
        return None
    if os.path.isabs(model):
        return Path(model) if os.path.isdir(model) else None
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    snapshots = sorted((hub / f"models--{model.replace('/', '--')}" / "snapshots").glob("*"))
    return snapshots[-1] if len(snapshots) == 1 else None  # of several nobody knows which it was


def read_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors checkpoint, from its headers; empty where there is none that can be read."""
    found: dict[str, tuple[int, ...]] = {}
    try:
        for file, wanted in files_of(checkpoint):
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                header = read_header(descriptor, file)
            finally:
                os.close(descriptor)
            found |= {name: header[name].shape for name in (header if wanted is None else wanted) if name in header}
    except (OSError, SourceError):
        return {}
    return found


def misfits(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]], *, silent: bool = False) -> str:
    """What of a push the checkpoint has no place for, as a sentence; "" if all fits, or nothing can be said.

    A name is held against a push only if most of its names are known: a trainer may call everything otherwise, and
    the engine know how. But where an engine is `silent` about names it leaves out, one at least must be known. A tied
    tensor may come by a name that the checkpoint leaves out.
    """
    table = manifest.tensors
    further = {name: other for other, name in table.aliases}
    unknown, wrong = [], []
    for name, shape in zip(table.names, table.shapes, strict=True):
        expected = shapes.get(name, shapes.get(further.get(name, "")))
        if expected is None:
            unknown.append(repr(name))
        elif expected != shape:
            wrong.append(f"{name!r} is {list(shape)} and should be {list(expected)}")
    if silent and shapes and unknown and len(unknown) == len(table.names):
        return f"its checkpoint has none of the names that are pushed, such as {unknown[0]}, but {min(shapes)!r}"
    if len(unknown) * 2 > len(table.names):
        return ""
    unknown = [name for name in unknown if name != "'lm_head.weight'"]  # of tied models: written by some, not by others
    problems = [f"its checkpoint has no {', '.join(unknown[:_SHOWN])}{_more(unknown)}"] if unknown else []
    problems += [f"{'; '.join(wrong[:_SHOWN])}{_more(wrong)}"] if wrong else []
    return "; ".join(problems)


def _parts(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]], *, sure: bool) -> str:
    if not shapes:
        return "its checkpoint, which would tell what that is, cannot be read here" if sure else ""
    there = {*manifest.tensors.names, *(other for other, _ in manifest.tensors.aliases), "lm_head.weight"}
    missing = [repr(name) for name in shapes if name not in there]
    if not missing or (not sure and len(missing) == len(shapes)):  # the trainer calls everything otherwise
        return ""
    return f"{', '.join(missing[:_SHOWN])}{_more(missing)} are missing"


def _more(found: list[str]) -> str:
    return f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
