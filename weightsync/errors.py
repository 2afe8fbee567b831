"""Every error weightsync raises, in one tree.

    WeightSyncError
    ├── ConfigError            a config file, flag or environment variable is wrong; nothing was started
    ├── SourceError            the weights, or an argument, given to push_weights are wrong; nothing was sent
    ├── ProtocolError          two peers disagree about the conversation
    │   ├── LocalProtocolError     this side used an object in an order it does not allow
    │   └── RemoteProtocolError    the other side sent something it must not send
    │       └── CodecError             … bytes that are no message of ours
    ├── TransportError         bytes could not be moved
    │   ├── TransportClosed        this side closed or aborted the transport
    │   ├── TransportBroken        the world broke it: a peer died, a checksum differs
    │   └── TransportTimeout       its deadline passed
    ├── EngineError            one engine failed
    │   ├── EngineRefused          it said beforehand that it cannot take these weights; it was not touched
    │   └── EngineLost             it no longer answers
    ├── PushError              a push as a whole did not succeed
    │   ├── PushRefused            what was asked for cannot be done; no engine was touched
    │   ├── PushAborted            a participant failed during the push; the error names the torn engines, if any
    │   └── PushTimeout            its deadline passed
    └── DaemonError            the conversation with weightsyncd failed
        └── DaemonLost             it cannot be reached, or stopped answering

Besides its sentence an error carries who and where (`model`, `version`, `rank`, `engine`, `bucket`, `phase`), and often
a `hint` that says how to put it right. `ErrorRecord` is the same as plain data, so that an error raised in the daemon
is raised again, unchanged, on every trainer rank.
"""

from __future__ import annotations

import re

import msgspec

__all__ = [
    "PLUGIN_HINT",
    "CodecError",
    "ConfigError",
    "DaemonError",
    "DaemonLost",
    "EngineError",
    "EngineLost",
    "EngineRefused",
    "ErrorRecord",
    "LocalProtocolError",
    "ProtocolError",
    "PushAborted",
    "PushError",
    "PushRefused",
    "PushTimeout",
    "RemoteProtocolError",
    "SourceError",
    "TransportBroken",
    "TransportClosed",
    "TransportError",
    "TransportTimeout",
    "WeightSyncError",
    "install_hint",
]


def install_hint(extra: str = "") -> str:
    """Return how to install weightsync, for hints: it is on no package index. `extra`: of pyproject.toml, "cuda13"."""
    what = f'".[{extra}]"' if extra else "."
    return f"pip install {what} in a clone of weightsync"


PLUGIN_HINT = f"""{install_hint()}, with the engine's own pip (".[cuda13]" or ".[cuda12]" where slots lie on GPUs)"""


class ErrorRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error as plain data, for the wire, reports and logs."""

    kind: str
    message: str
    model: str | None = None
    version: int | None = None
    rank: int | None = None
    engine: str | None = None
    bucket: int | None = None
    phase: str | None = None
    hint: str | None = None

    def of_engine(self, name: str) -> str:
        """Return the sentence with the engine's name before it, unless the sentence names the engine itself."""
        named = re.search(rf"\b(engine|of) {re.escape(name)}(?![\w.-])", self.message)
        return self.message if named else f"{name}: {self.message}"

    def error(self) -> WeightSyncError:
        """Return the exception that this record describes. An unknown `kind` becomes the root of the tree."""
        return _KINDS.get(self.kind, WeightSyncError)(
            self.message,
            model=self.model,
            version=self.version,
            rank=self.rank,
            engine=self.engine,
            bucket=self.bucket,
            phase=self.phase,
            hint=self.hint,
        )


class WeightSyncError(Exception):
    """Root of the tree. `str()` gives the sentence, then who and where, then the hint on a line of its own."""

    def __init__(
        self,
        message: str,
        *,
        model: str | None = None,
        version: int | None = None,
        rank: int | None = None,
        engine: str | None = None,
        bucket: int | None = None,
        phase: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.model = model
        self.version = version
        self.rank = rank
        self.engine = engine
        self.bucket = bucket
        self.phase = phase
        self.hint = hint

    def __str__(self) -> str:
        where = " ".join(
            f"{name}={value}"
            for name in ("model", "version", "rank", "engine", "bucket", "phase")
            if (value := getattr(self, name)) is not None
        )
        text = f"{self.message} [{where}]" if where else self.message
        return f"{text}\n  hint: {self.hint}" if self.hint else text

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.record(),))

    def record(self) -> ErrorRecord:
        """Return this error as plain data."""
        return ErrorRecord(
            kind=type(self).__name__,
            message=self.message,
            model=self.model,
            version=self.version,
            rank=self.rank,
            engine=self.engine,
            bucket=self.bucket,
            phase=self.phase,
            hint=self.hint,
        )


def _rebuild(record: ErrorRecord) -> WeightSyncError:
    return record.error()


class ConfigError(WeightSyncError):
    """A config file, flag or environment variable is wrong; nothing was started."""


class SourceError(WeightSyncError):
    """The weights, or an argument, given to `push_weights` are wrong; nothing was sent."""


class ProtocolError(WeightSyncError):
    """Two peers disagree about the conversation."""


class LocalProtocolError(ProtocolError):
    """This side used an object in an order it does not allow."""


class RemoteProtocolError(ProtocolError):
    """The other side sent something it must not send."""


class CodecError(RemoteProtocolError):
    """Bytes from outside that are no message of ours."""


class TransportError(WeightSyncError):
    """Bytes could not be moved."""


class TransportClosed(TransportError):
    """This side closed or aborted the transport."""


class TransportBroken(TransportError):
    """The world broke the transport: a peer died, a mapping vanished, a checksum differs."""


class TransportTimeout(TransportError):
    """A transport operation's deadline passed."""


class EngineError(WeightSyncError):
    """One engine failed."""


class EngineRefused(EngineError):
    """The engine said beforehand that it cannot take these weights; it was not touched."""


class EngineLost(EngineError):
    """The engine no longer answers."""


class PushError(WeightSyncError):
    """A push as a whole did not succeed."""


class PushRefused(PushError):
    """What was asked for cannot be done; no engine was touched."""


class PushAborted(PushError):
    """A participant failed during the push; the sentence names the engines left torn, if any."""


class PushTimeout(PushError):
    """The deadline of the push passed."""


class DaemonError(WeightSyncError):
    """The conversation with weightsyncd failed."""


class DaemonLost(DaemonError):
    """weightsyncd cannot be reached, or stopped answering."""


def _tree(root: type[WeightSyncError]) -> dict[str, type[WeightSyncError]]:
    kinds = {root.__name__: root}
    for child in root.__subclasses__():
        kinds.update(_tree(child))
    return kinds


_KINDS = _tree(WeightSyncError)
