"""Every error weightsync raises, in one tree.

    WeightSyncError
    ├── ConfigError            a config file, flag or environment variable is wrong; nothing was started
    ├── SourceError            the weights given to push_weights cannot be described; nothing was sent
    ├── ProtocolError          two peers disagree about the conversation
    │   ├── LocalProtocolError     this side used an object in an order it does not allow
    │   └── RemoteProtocolError    the other side sent something it must not send
    │       └── CodecError             … bytes that are no message of ours
    ├── TransportError         bytes could not be moved
    │   ├── TransportClosed        this side closed or aborted the transport
    │   ├── TransportBroken        the world broke it: a peer died, a checksum differs
    │   └── TransportTimeout       its deadline passed
    ├── EngineError            one engine failed
    │   ├── EngineRefused          it says beforehand that it cannot take these weights; it was not touched
    │   └── EngineLost             it does not answer any more
    ├── PushError              a push as a whole did not succeed
    │   ├── PushRefused            before any engine was touched, because of what was asked
    │   ├── PushAborted            under way, because a participant failed; the error names the torn engines, if any
    │   └── PushTimeout            its deadline passed
    └── DaemonError            the conversation with weightsyncd failed
        └── DaemonLost             it cannot be reached, or stopped answering

An error is a record: beside its sentence it carries who and where (`model`, `version`, `rank`, `engine`, `bucket`,
`phase`) and, where there is one, a `hint` that says what would be right. `ErrorRecord` is the same as plain data, so
that an error raised in the daemon is raised again, alike, on every trainer rank.
"""

from __future__ import annotations

import msgspec

__all__ = [
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
]


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
        """The sentence, among those of several engines: with the engine's name before it, unless that is in it."""
        return self.message if name in self.message.split() else f"{name}: {self.message}"

    def error(self) -> WeightSyncError:
        """The exception this record describes; an unknown `kind` becomes the root of the tree."""
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
        """This error as plain data."""
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
    """The weights given to `push_weights` cannot be described; nothing was sent."""


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
    """The engine says beforehand that it cannot take these weights; it was not touched."""


class EngineLost(EngineError):
    """The engine does not answer any more."""


class PushError(WeightSyncError):
    """A push as a whole did not succeed."""


class PushRefused(PushError):
    """Refused before any engine was touched, because of what was asked."""


class PushAborted(PushError):
    """Ended under way because a participant failed; the sentence names the engines left torn, if any."""


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
