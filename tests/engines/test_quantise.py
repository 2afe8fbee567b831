"""What vLLM's and SGLang's own functions make float8 of, run in their interpreters, is what the fixture says they do.

tests/unit/test_sources_quantised.py holds what we send against that fixture.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.engines.kit import ENGINES, installed

pytestmark = [pytest.mark.engines, pytest.mark.engines_slow, pytest.mark.timeout(240)]
FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures/engines/fp8.json").read_text())


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_the_fixture_is_what_the_engine_says(kind, tmp_path):
    if installed(kind) != FIXTURE["about"][kind]:
        pytest.skip(f"recorded with {FIXTURE['about'][kind]}")
    done = subprocess.run(
        [ENGINES / kind / "bin/python", Path(__file__).with_name("fp8_oracle.py"), kind],
        capture_output=True,
        text=True,
        check=False,
        timeout=220,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": "", "SGLANG_USE_CPU_ENGINE": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout) == FIXTURE[kind]
