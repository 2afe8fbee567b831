"""Check a push against the names and shapes of the checkpoint that an engine was started on, before it is touched.

Engines check what they load late or not at all: SGLang skips unknown names with a line in its log, and some loaders
narrow a tensor of another shape until it fits. A trainer of the same model pushes the names and shapes of that
checkpoint. If the server runs on this machine, the checkpoint's headers can be read here. If they cannot be read, a
push is refused only where its caller must be `sure` that it has the whole model.
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
    """The check for one incarnation of a server. Reads the headers once, when first needed."""

    def __init__(self, model: str | None, engine: str, *, silent: bool = False) -> None:
        """`model` is the path or name that the server was started on; None counts as a checkpoint that cannot be read.

        `silent`: the engine skips unknown names without an error.
        """
        self._silent = silent
        self._model = model
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] | None = None

    async def refuse(self, manifest: Manifest, *, whole: str = "", sure: bool = False) -> None:
        """Raise `EngineRefused` naming the tensors that the checkpoint has no place for.

        `whole` says why only a whole model can be loaded; a push that lacks tensors is then refused too. With `sure` as
        well, any push is refused if the checkpoint cannot be read.
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
    """Find the folder of a server's model, which is a path or a name in the Hugging Face cache; None: not here."""
    if not model:
        return None
    if os.path.isabs(model):
        return Path(model) if os.path.isdir(model) else None
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    snapshots = sorted((hub / f"models--{model.replace('/', '--')}" / "snapshots").glob("*"))
    return snapshots[-1] if len(snapshots) == 1 else None  # with several, the server may have any of them


def read_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Read the names and shapes of a safetensors checkpoint from its headers; empty if it cannot be read."""
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
    """Say which tensors of a push the checkpoint has no place for; "" if all fit, or if it cannot be told.

    Unknown names count only if at least half of the push's names are known: a trainer may use other names throughout,
    which the engine's loader translates. If the engine skips names silently (`silent`), at least one must be known. A
    tied tensor may come by a name that the checkpoint leaves out.
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
    unknown = [name for name in unknown if name != "'lm_head.weight'"]  # checkpoints of tied models may leave it out
    problems = [f"its checkpoint has no {', '.join(unknown[:_SHOWN])}{_more(unknown)}"] if unknown else []
    problems += [f"{'; '.join(wrong[:_SHOWN])}{_more(wrong)}"] if wrong else []
    return "; ".join(problems)


def _parts(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]], *, sure: bool) -> str:
    if not shapes:
        return "its checkpoint, which would tell what that is, cannot be read here" if sure else ""
    there = {*manifest.tensors.names, *(other for other, _ in manifest.tensors.aliases), "lm_head.weight"}
    missing = [repr(name) for name in shapes if name not in there]
    if not missing or (not sure and len(missing) == len(shapes)):  # the trainer uses other names throughout
        return ""
    return f"{', '.join(missing[:_SHOWN])}{_more(missing)} are missing"


def _more(found: list[str]) -> str:
    return f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
