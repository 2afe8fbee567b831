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


def listed(page: str, heading: str) -> list[str]:
    """The names of a page's numbered list, each of which may import those before it."""
    part = (ROOT / "docs" / page).read_text().split(f"{heading}\n")[1].split("\n#")[0]
    lines = re.findall(r"^\d+\. ([^:]+):", part, re.MULTILINE)
    return [name for line in lines for name in re.findall(r"`(\w+)`", line)]


def layer(module: str) -> str:
    """Which of them a module is in; those of the daemon are all in one."""
    package, *inside = module.split(".")
    return inside[0] if package == "weightsync" and inside else package


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line of all that is imported when the code runs, at its beginning or later, and its module, or a name in that."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "weightsync":  # of which it loads some when asked
            homes = weightsync._HOMES
            yield from ((node.lineno, homes.get(name.name, f"weightsync.{name.name}")) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{name.name}") for name in node.names)
        yield from imports(node)


def test_imports_point_down():
    order, wrong, seen = listed("design.md", "### Layers"), [], set[str]()
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


def test_modules_of_the_session_import_those_before_them():
    order = listed("session.md", "## How an event is answered")
    files = {file.stem: file for file in (ROOT / "weightsync" / "session").glob("*.py") if file.stem != "__init__"}
    assert sorted(order) == sorted(files), "docs/session.md lists all there are, each once"
    for here, file in files.items():
        for line, name in imports(ast.parse(file.read_text())):
            *package, module = name.split(".")[:3]
            if package == ["weightsync", "session"]:
                assert module in order[: order.index(here)], f"{file.name}:{line} imports {module}"
