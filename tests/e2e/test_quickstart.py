"""docs/quickstart.md, "By hand": followed word by word, and what it shows is what comes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
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
    """Its words, in which every number is the same: lines break elsewhere when a number is longer."""
    return re.sub(r"\d[\d.,:-]*", "N", text).split()


def run(script: str, here: str) -> str:
    """What it prints. Whatever it has started ends with it."""
    environment = {**os.environ, "XDG_RUNTIME_DIR": here, "COLUMNS": "100", "PYTHONPATH": f"{ROOT}:{ROOT / 'daemon'}"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    for name in ("WEIGHTSYNC_DAEMON", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        environment.pop(name, None)
    bash = subprocess.Popen(
        ["bash", "-c", f"exec 2>&1; trap 'kill $(jobs -p) 2> /dev/null' EXIT\n{script}\nwait"],
        cwd=here,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed = bash.communicate(timeout=280)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(bash.pid, signal.SIGKILL)
    assert bash.returncode == 0, printed[-4000:]
    return printed


def test_it_can_be_followed_word_by_word(no_leaks, unused_port):
    blocks, port = read_page(), str(unused_port)
    commands = [text.replace("8000", port) for language, _, text in blocks if language == "bash"]
    script = f"echo '{MARK}'\n".join([*commands, ""]).replace("wait %2", "wait %2 || exit 1")  # weightsyncd's status
    with tempfile.TemporaryDirectory(prefix="ws-quick-") as here:  # sockets: their paths must be short
        for _, name, text in blocks:
            if name:
                Path(here, name).write_text(text.replace("8000", port))
        outputs = iter(run(script, here).replace(port, "8000").split(MARK))
    came = ""
    for language, name, text in blocks:
        if language == "bash":
            came = next(outputs)
        elif language == "text" and not name:
            words = without_figures(text)
            assert words == without_figures(came)[-len(words) :], came
