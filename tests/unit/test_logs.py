"""What log lines are about, as fields of their own."""

from __future__ import annotations

import ast
import asyncio
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from weightsync.errors import ErrorRecord
from weightsync.logs import JsonFormatter, about, of_error
from weightsyncd.context import PushContext

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def written():
    """A logger, and the lines that it has written."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler = Handler()
    handler.setFormatter(JsonFormatter(bridge="n0/1"))
    logger = logging.getLogger("weightsyncd.push")
    before = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(handler)
    yield logger, lines
    logger.removeHandler(handler)
    logger.level, logger.propagate = before


def said(written) -> dict[str, object]:
    (line,) = written[1]
    fields: dict[str, object] = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", str(fields.pop("time")))
    return fields


def test_what_the_text_names_is_a_field(written):
    words = ("e0", 7, "load", 3, "it answered 500")
    written[0].warning("[engine=%s v=%d] %s.failed bucket=%s: %s", *words, extra={"phase": "load"})
    assert said(written) == {
        "level": "warning", "logger": "weightsyncd.push", "bridge": "n0/1", "engine": "e0", "version": 7, "bucket": 3,
        "phase": "load", "message": "[engine=e0 v=7] load.failed bucket=3: it answered 500",
    }  # fmt: skip


def test_a_push_goes_by_its_model_and_has_a_name_of_its_own(written):
    context = PushContext("n0-abcd", "policy", 7)
    with context.lines():
        written[0].info("[model=%s v=%d] committed", "policy", 7)
    fields = said(written)
    assert (fields["push"], fields["model"], fields["version"]) == ("n0-abcd", "policy", 7)


def test_fields_reach_the_tasks_of_a_block_and_none_after_it(written):
    async def work() -> None:
        written[0].info("in a task")

    async def blocks() -> None:
        with about(push="p"):
            task = asyncio.create_task(work())
            with about(push="q", rank=1):
                written[0].info("within")
        written[0].info("after")
        await task

    asyncio.run(blocks())
    found = {f["message"]: (f.get("push"), f.get("rank")) for f in map(json.loads, written[1])}
    assert found == {"within": ("q", 1), "after": (None, None), "in a task": ("p", None)}


def test_nothing_is_made_up(written):
    logger, lines = written
    logger.info("100 %% of bucket=%s", None)
    logger.info("bucket=%(bucket)d", {"bucket": 3})
    logger.info("width=%*d", 5, 3)
    logger.info("bucket=3, not filled in by the line")
    logger.info("message=%s level=%s", "one", "two")
    for line in map(json.loads, lines):
        assert set(line) == {"time", "level", "logger", "bridge", "message"}
    assert json.loads(lines[-1])["level"] == "info"


def test_an_error_says_where(written):
    record = ErrorRecord(kind="PushAborted", message="no", engine="e0", bucket=3, hint="yes")
    assert of_error(record) == {"error": "PushAborted", "engine": "e0", "bucket": 3, "hint": "yes"}
    try:
        raise ValueError("it broke")
    except ValueError:
        written[0].exception("failed", extra=of_error(record))
    fields = said(written)
    assert "ValueError: it broke" in str(fields["exception"])
    assert fields["error"] == "PushAborted"


@pytest.mark.parametrize("form", ["human", "json"])
def test_a_process_writes_as_it_was_told(form):
    script = (
        "import sys, logging; from weightsync import logs\n"
        "logs.set_up('info', sys.argv[1], bridge='n%s/0')\n"
        "logging.getLogger('x').info('[generation=%d] join.complete', 2); logging.getLogger('x').debug('not this')"
    )
    done = subprocess.run([sys.executable, "-c", script, form], capture_output=True, text=True, check=True, timeout=30)
    (line,) = done.stderr.splitlines()
    if form == "human":
        assert re.fullmatch(r"[\d-]+ [\d:,]+ INFO    x \[bridge=n%s/0\] \[generation=2\] join.complete", line)
    else:
        assert json.loads(line)["generation"] == 2


def test_ranks_that_lines_speak_of_are_fields():
    """`rank %d` reads better than `rank=%d`, and needs `extra=`."""
    missing = []
    for path in [*(ROOT / "daemon").rglob("*.py"), *(ROOT / "weightsync" / "keeper").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
                continue
            text = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
            logs = isinstance(node.func.value, ast.Name) and node.func.value.id == "logger"
            if logs and isinstance(text, str) and re.search(r"\b(rank|bucket|engine) %", text):
                missing += [f"{path.name}:{node.lineno}"] if not any(k.arg == "extra" for k in node.keywords) else []
    assert missing == []
