"""Docs that are made from code are what the code says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from weightsync.config import parse_node_config
from weightsync.wire.messages import MESSAGES

ROOT = Path(__file__).parent.parent.parent


def test_the_session_page_is_current():
    done = subprocess.run([sys.executable, ROOT / "docs" / "make_state_diagram.py", "--check"], check=False, timeout=30)
    assert done.returncode == 0, "run: make docs"


def test_the_example_config_is_valid_and_shows_the_defaults(monkeypatch):
    monkeypatch.setenv("E0_KEY", "secret")
    text = re.search(r"```toml\n(.*?)```", (ROOT / "docs" / "configuration.md").read_text(), re.DOTALL)
    assert text is not None
    shown, default = parse_node_config(text[1]), parse_node_config("")
    for section in ("node", "arena", "timeouts", "http", "log"):
        assert getattr(shown, section) == getattr(default, section)


def test_files_named_in_the_docs_exist():
    for page in (ROOT / "docs").rglob("*.md"):
        for name in re.findall(r"`((?:weightsync|daemon|tests|bench)/[\w./]+\.py)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_the_wire_page_names_every_message_and_none_that_is_not_there():
    page = (ROOT / "docs" / "internals" / "wire.md").read_text()
    _, table = page.split("\n| from → to | messages |\n|---|---|\n")
    rows = table.split("\n\n")[0].splitlines()
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == {str(message.__struct_config__.tag) for message in MESSAGES}
