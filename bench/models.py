"""Lists the models whose shapes come with the benchmarks: tensors and bytes, computed from their published configs."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from bench import shapes
from bench.harness import suite


def main() -> None:
    """The models whose shapes come along: tensors and bytes of each, and what their configs say of their types."""
    table = Table(title="bench/shapes: names and shapes of published checkpoints")
    for column in ("--shape", "tensors", "GB", "types", "config"):
        table.add_column(column, justify="right" if column in ("tensors", "GB") else "left", overflow="fold")
    for name in shapes.names():
        model = shapes.load(name)
        types = ", ".join(sorted({tensor.dtype for tensor in model.tensors.values()}))
        table.add_row(name, f"{len(model.tensors):,}", f"{model.nbytes / 1e9:.1f}", types, model.source)
    Console().print(table)


app = suite(main)
if __name__ == "__main__":
    app()
