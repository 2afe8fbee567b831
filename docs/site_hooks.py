"""Hooks for mkdocs: two pages of the site lie in the repository's root, where people look for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
FROM_ROOT = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pages of `FROM_ROOT`, with links that are right from docs/."""
    for page, file in FROM_ROOT.items():
        text = (ROOT / file).read_text().replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files
