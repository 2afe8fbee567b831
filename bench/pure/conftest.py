"""Trims a file of measurements: it keeps the figures, not each round, and the machine's load."""

from __future__ import annotations

import os
from typing import Any

_CPU = ("brand_raw", "arch", "count", "hz_advertised_friendly", "l2_cache_size", "l3_cache_size")


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """See pytest-benchmark's hooks."""
    for one in output_json["benchmarks"]:
        one["stats"].pop("data", None)
    machine = output_json["machine_info"]
    machine["cpu"] = {key: machine["cpu"][key] for key in _CPU if key in machine.get("cpu", {})}
    output_json["load"] = [round(x, 2) for x in os.getloadavg()]
