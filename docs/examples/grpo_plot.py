"""The plot of `grpo_tiny.py`: reward and logprob gap of every run in a folder, side by side."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["plot"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def plot(folder: Path) -> Path:
    """Draw the runs whose JSON lies in `folder`; returns the SVG's path."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    runs: list[dict[str, Any]] = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "grpo", "font.size": 9}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        reward, gap = figure.subplots(1, 2)
        for run, colour in zip(runs, COLOURS * len(runs), strict=False):
            steps = [row["step"] for row in run["steps"]]
            reward.plot(steps, [row["reward"] for row in run["steps"]], color=colour, label=run["name"])
            gap.plot(steps, [row["gap_mean"] for row in run["steps"]], color=colour)
            gap.plot(steps, [row["gap_max"] for row in run["steps"]], color=colour, linestyle=":")
        reward.set(xlabel="step", ylabel="digits among generated tokens", ylim=(0, 1.02), title="Reward")
        gap.set(xlabel="step", ylabel="|engine − trainer|, nats", yscale="log", title="Logprob gap: mean, max dotted")
        for axes in (reward, gap):
            axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
        path = folder / "grpo_tiny.svg"
        figure.savefig(path, metadata={"Date": None})
    return path
