"""make_plugins.py FOLDER: makes this checkout's weightsync a package with entry points, for an engine's PYTHONPATH.

The engines' environments stay as their makers pinned them: they see weightsync only if FOLDER is on their path.
"""

import sys
import tomllib
from pathlib import Path


def main(folder: Path) -> None:
    checkout = Path(__file__).resolve().parent.parent
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    link = folder / "weightsync"
    link.unlink(missing_ok=True)
    link.symlink_to(checkout / "weightsync")
    info = folder / f"weightsync-{project['version']}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: weightsync\nVersion: {project['version']}\n")
    lines = []
    for group, points in project.get("entry-points", {}).items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
