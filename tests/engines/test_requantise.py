"""Full-precision weights into a real SGLang that quantises its own (`--quantization fp8`), through our plugin.

What it generates is compared with what it generated when it was started on these weights.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.engines.yard import Need

pytestmark = [pytest.mark.engines, pytest.mark.engines_slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("node", [pytest.param(Need("sglang", "plugin", dtype="bfloat16", fp8=True))], indirect=True)
def test_layers_quantise_what_is_pushed_as_they_did_at_the_start(node: Any) -> None:
    for _ in range(2):
        node.push("base")
        with pytest.raises(AssertionError):
            node.check("pert")
        node.push("pert")
        node.check("pert")
    replay = node.engine_status().replay
    assert replay.phase == "replay"
    assert replay.by_loader, "what quantises is no copy"
