"""docs/quickstart.md, "By hand": followed word by word, and what it shows is what comes."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)(?: title=\"([\w.]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = "@@ end of block @@"


def read_page() -> list[tuple[str, str, str]]:
    """(language, file name, text) of each block of the second half."""
    _, by_hand = (ROOT / "docs/quickstart.md").read_text().split("\n## By hand\n")
    return BLOCK.findall(by_hand)


def without_figures(text: str) -> list[str]:
    """Lines in which every number is the same, and columns are as wide as they may be."""
    lines = [" ".join(re.sub(r"\d[\d.,:-]*", "N", line).split()) for line in text.splitlines()]
    return [line for line in lines if line]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_it_can_be_followed_word_by_word():
    blocks = read_page()
    commands = [text for language, _, text in blocks if language == "bash"]
    with tempfile.TemporaryDirectory(prefix="ws-quick-") as here:  # sockets: their paths must be short
        for _, name, text in blocks:
            if name:
                Path(here, name).write_text(text)
        port = str(free_port())
        script = "set -e\ntrap 'kill $(jobs -p) 2> /dev/null' EXIT\n" + f"echo '{MARK}'\n".join([*commands, ""])
        for file in Path(here).iterdir():
            file.write_text(file.read_text().replace("8000", port))
        environment = {
            **os.environ,
            "XDG_RUNTIME_DIR": here,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'daemon'}",
            "COLUMNS": "100",
        }
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        for name in ("WEIGHTSYNC_DAEMON", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
            environment.pop(name, None)
        done = subprocess.run(
            ["bash", "-c", script.replace("8000", port)],
            cwd=here,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    outputs = iter(done.stdout.replace(port, "8000").split(MARK))
    if out := os.environ.get("QUICKSTART_OUT"):
        Path(out).write_text(done.stdout.replace(port, "8000"))
    came = ""
    for language, name, text in blocks:
        if language == "bash":
            came = next(outputs)
        elif language == "text" and not name:
            assert without_figures(text) == without_figures(came)[-len(without_figures(text)) :], came
