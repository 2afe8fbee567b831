"""`push_lora`: pushes a LoRA adapter alone, to engines that serve it beside the base model."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsync.endpoints import default_endpoint
from weightsync.errors import PushAborted, SourceError
from weightsync.trainer.arguments import checked_model, checked_timeout, whole_number
from weightsync.wire import messages as msg
from weightsync.wire.codec import MAX_FRAME

if TYPE_CHECKING:
    from weightsync.errors import ErrorRecord

__all__ = ["LoraEngineReport", "LoraReport", "push_lora"]

_ROOM = 1 << 16  # bytes of a frame for everything but the LoRA adapter
_PATIENCE = 15.0  # seconds to wait for the daemon's answer beyond the timeout


@dataclass(frozen=True)
class LoraEngineReport:
    """How the push ended on one engine."""

    engine: str
    node: str
    outcome: str  # loaded | failed (keeps what it had) | lost (does not answer)
    error: ErrorRecord | None


@dataclass(frozen=True)
class LoraReport:
    """A push of a LoRA adapter that reached at least one engine."""

    model: str
    served: str  # the name to ask engines for: name@version
    version: int
    bytes: int  # of the LoRA adapter
    seconds: float
    engines: tuple[LoraEngineReport, ...]

    @property
    def complete(self) -> bool:
        """Whether all engines have loaded it."""
        return all(engine.outcome == "loaded" for engine in self.engines)


def push_lora(
    lora: Any,
    *,
    version: int,
    name: str = "policy",
    config: Any = None,
    model: str = "default",
    keep: int = 0,
    gather: bool = False,
    daemon: str | None = None,
    process_group: Any = None,
    timeout: float = 120.0,
) -> LoraReport | None:
    """Have every engine of `model` load a LoRA adapter as `name@version`, and unload those of lower versions.

    Engines must serve LoRA (docs/trainers-lora.md). Call it on rank 0 alone, or on all ranks. Rank 0 sends the adapter
    to its daemon, which tells each engine once; the other ranks return None at once. With `gather` all must call.

    lora: a `PeftModel`, whose active adapter is sent; or a mapping from names to tensors, as peft saves them, with
        `config`.
    version: must be higher than every version of `name` that an engine has loaded.
    config: for a mapping: peft's `LoraConfig`, or a mapping of the same.
    keep: how many earlier versions stay loaded, for clients that still ask for them.
    gather: gather sharded matrices (FSDP2). This is a collective.
    timeout: seconds until all engines have loaded it. The old versions are unloaded after that.

    An engine that fails keeps what it had: look at `report.complete`.

    Raises:
        `SourceError`: engines would not compute the adapter as the trainer does, or an argument is wrong.
        `PushRefused`: the request is invalid; no engine was touched.
        `PushAborted`: no engine has loaded it.
        `PushTimeout`: the node was busy for the whole time.
        `DaemonLost`: weightsyncd cannot be reached, or stopped answering.
    """
    from weightsync.operator import ask
    from weightsync.sources.lora_files import adapter_files
    from weightsync.trainer.place import trainer_place

    version, keep = whole_number("version", version), whole_number("keep", keep)
    model, timeout = checked_model(model), checked_timeout(timeout)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        hint = "up to 64 letters, digits, dots, dashes and underscores"
        raise SourceError(f"name = {name!r} is not a valid adapter name", hint=hint)
    first = trainer_place(process_group).rank == 0
    if not first and not gather:
        return None
    started = time.monotonic()
    said, weights = adapter_files(lora, config, gather=gather)
    if not first:
        return None
    if len(weights) + len(said) > MAX_FRAME - _ROOM:
        raise SourceError(
            f"the adapter has {len(weights)} bytes, and {MAX_FRAME - _ROOM} can be sent",
            hint="push_weights(model, version=...) sends it merged, whatever its size",
        )
    question = msg.PushLora(
        id=1,
        model=model,
        name=name,
        version=version,
        keep=keep,
        timeout=timeout,
        config=said,
        weights=weights,
        forward=True,
    )
    endpoint = daemon or os.environ.get("WEIGHTSYNC_DAEMON") or default_endpoint()
    answer = ask(endpoint, question, msg.LoraPushed, timeout + _PATIENCE)
    report = LoraReport(
        model=model,
        served=f"{name}@{version}",
        version=version,
        bytes=len(weights),
        seconds=time.monotonic() - started,
        engines=tuple(LoraEngineReport(e.engine, e.node, e.outcome, e.error) for e in answer.engines),
    )
    if not any(engine.outcome == "loaded" for engine in report.engines):
        errors = "; ".join(e.error.of_engine(e.engine) for e in report.engines if e.error is not None)
        raise PushAborted(f"no engine has loaded {report.served}: {errors}", model=model, version=version)
    return report
