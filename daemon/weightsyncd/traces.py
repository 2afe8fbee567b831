"""Traces of pushes as files, the newest of them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

__all__ = ["write_trace"]

logger = logging.getLogger(__name__)

_KEPT = 20  # files


def write_trace(directory: str, name: str, document: dict[str, Any]) -> None:
    """Write one, and remove those beyond the newest. A directory that cannot be written to is a warning: the push it is
    of has ended, and well or badly for other reasons.
    """
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f".{name}.json"
        draft.write_text(json.dumps(document))
        draft.rename(folder / f"{name}.json")
        written = sorted(folder.glob("push-*.json"), key=lambda path: path.stat().st_mtime)
        for path in written[:-_KEPT]:
            path.unlink()
    except OSError as error:
        logger.warning("log.trace_dir: %s", error)
