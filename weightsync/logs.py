"""Log lines of weightsyncd, its bridges and its keepers: text for people, or one JSON object a line.

JSON lines have a field for each thing that a line is about. Fields come from three places: from the line's own format
string, in which `bucket=%d` names its argument (so text and JSON cannot differ); from `extra=`; and from `about`, for
all lines of a push. A push is named by model and version, `[model=MODEL v=VERSION]`. In JSON `v` is `version`, and
`push` is the nodes' name for this one attempt.
"""

from __future__ import annotations

import json
import logging
import re
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextvars import Token

    from weightsync.errors import ErrorRecord

__all__ = ["JsonFormatter", "about", "of_error", "set_up"]

_NOW: ContextVar[Mapping[str, Any]] = ContextVar("weightsync_log_fields", default={})  # noqa: B039 - never changed
_CONVERSION = re.compile(r"(?:(\w+)=)?%[#0 +-]*(?:\d+|\*)?(?:\.(?:\d+|\*))?([a-zA-Z%])")
_OWN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class about:  # noqa: N801 - reads as a word of a `with` statement
    """Give all lines logged in the block, and by tasks started in it, these fields in JSON."""

    __slots__ = ("_fields", "_tokens")

    def __init__(self, **fields: Any) -> None:
        self._fields = fields
        self._tokens: list[Token[Mapping[str, Any]]] = []

    def __enter__(self) -> None:
        self._tokens.append(_NOW.set({**_NOW.get(), **self._fields}))

    def __exit__(self, *_: object) -> None:
        _NOW.reset(self._tokens.pop())


def of_error(error: ErrorRecord) -> dict[str, Any]:
    """Return an error's kind and where it happened, for `extra=`."""
    where = {name: getattr(error, name) for name in ("rank", "engine", "bucket", "phase", "hint")}
    return {"error": error.kind, **{name: value for name, value in where.items() if value is not None}}


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def __init__(self, **always: str) -> None:
        """`always` are fields of every line."""
        super().__init__()
        self._always = always

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        extra = {name: value for name, value in record.__dict__.items() if name not in _OWN}
        fields = {**self._always, **_NOW.get(), **_named(record), **extra}
        more = {name: _plain(value) for name, value in fields.items() if value is not None and name not in line}
        return json.dumps({**line, **more}, ensure_ascii=False)


def set_up(level: str, form: Literal["human", "json"], **always: str) -> None:
    """Have this process log to stderr. In text, `always` stands in brackets before each message."""
    handler = logging.StreamHandler()
    if form == "json":
        handler.setFormatter(JsonFormatter(**always))
    else:
        words = " ".join(f"{name}={value}" for name, value in always.items()).replace("%", "%%")
        brackets = f"[{words}] " if words else ""
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)-7s %(name)s {brackets}%(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def _named(record: logging.LogRecord) -> dict[str, Any]:
    """Return the fields that a line's format string names."""
    names = _names(record.msg) if isinstance(record.msg, str) and isinstance(record.args, tuple) else ()
    if not record.args or len(names) != len(record.args):
        return {}
    return {name: value for name, value in zip(names, record.args, strict=True) if name}


@lru_cache(maxsize=1024)
def _names(template: str) -> tuple[str, ...]:
    """Return the name of each conversion of a format string: "" for one without a name."""
    found = [match[1] or "" for match in _CONVERSION.finditer(template) if match[2] != "%"]
    if "*" in template:  # a width is among the arguments, so arguments and conversions cannot be matched
        return ()
    return tuple("version" if name == "v" else name for name in found)


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) else str(value)
