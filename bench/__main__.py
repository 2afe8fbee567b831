"""All CPU benchmarks, one after the other: `python -m bench [--json-dir DIR]`. Each runs alone too, with options."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

NAMES = ("describe", "plan", "transports", "control", "push")


def main() -> int:
    """Run each in a process of its own, so that none warms another up."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--json-dir", type=Path, help="write NAME.json for each benchmark into this folder")
    parser.add_argument("--only", choices=NAMES, action="append", help="run this one; may be given several times")
    arguments = parser.parse_args()
    failed = 0
    for name in arguments.only or NAMES:
        command = [sys.executable, "-m", f"bench.bench_{name}"]
        if arguments.json_dir is not None:
            arguments.json_dir.mkdir(parents=True, exist_ok=True)
            command += ["--json", str(arguments.json_dir / f"{name}.json")]
        failed += subprocess.run(command, check=False).returncode != 0
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
