"""Imports point down: docs/design.md lists the layers, and every import of the code is to one that comes earlier."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING

import weightsync

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent.parent
FOLDERS = {"weightsync": ROOT, "weightsyncd": ROOT / "daemon"}


def layers() -> list[str]:
    page = (ROOT / "docs" / "design.md").read_text().split("### Layers\n")[1].split("\n#")[0]
    return [
        name for line in re.findall(r"^\d+\. ([^:]+):", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", line)
    ]


def layer(module: str) -> str:
    """Which of them a module is in; those of the daemon are all in one."""
    package, *inside = module.split(".")
    return inside[0] if package == "weightsync" and inside else package


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and module of all that is imported when the code runs, at its beginning or later."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "weightsync":  # of which it loads some when asked
            homes = weightsync._HOMES
            yield from ((node.lineno, homes.get(name.name, f"weightsync.{name.name}")) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""
        yield from imports(node)


def test_imports_point_down():
    order, wrong, seen = layers(), [], set[str]()
    for package, folder in FOLDERS.items():
        for file in (folder / package).rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            here = layer(".".join(part for part in parts if part != "__init__"))
            seen.add(here)
            for line, module in imports(ast.parse(file.read_text())):
                there = "weightsync" if module == "weightsync.__version__" else layer(module)
                if module.split(".")[0] not in FOLDERS or there == here or here not in order:
                    continue
                if there not in order[: order.index(here)]:
                    wrong.append(f"{file.relative_to(ROOT)}:{line} imports {module}: {here} lies below {there}")
    assert sorted(order) == sorted(seen), "docs/design.md (Layers) lists all there are, each once"
    assert not wrong, "imports that point up (docs/design.md, Layers):\n" + "\n".join(wrong)
