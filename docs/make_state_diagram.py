"""Writes the diagram and the table of docs/session.md from `weightsync.session.machine.TRANSITIONS`.

python docs/make_state_diagram.py            write
python docs/make_state_diagram.py --check    exit status 1 when the page is not what the table says
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from weightsync.session.machine import TRANSITIONS, State

PAGE = Path(__file__).with_name("session.md")
BEGIN, END = "<!-- made by make_state_diagram.py -->", "<!-- end -->"


def diagram() -> str:
    """The states and what leads from one to another, as Mermaid and as a table."""
    edges: dict[tuple[State, State], list[str]] = {}
    rows = []
    for (state, event), (method, follows) in TRANSITIONS.items():
        if method.__name__ == "_ignore":
            continue
        for target in follows:
            if target is not state:
                edges.setdefault((state, target), []).append(event.__name__)
        after = ", ".join(str(s) for s in dict.fromkeys(follows)) or "–"
        rows.append(f"| {state} | `{event.__name__}` | `{method.__name__.removeprefix('_')}` | {after} |")
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {State.OPENING}"]
    for (state, target), events in edges.items():
        label = ", ".join(events) if len(events) <= 3 else f"{', '.join(events[:2])} and {len(events) - 2} more"
        lines.append(f"    {state} --> {target}: {label}")
    lines += [f"    {state} --> [*]" for state in State if state.ended]
    lines += ["```", "", "| state | event | decided by | may lead to |", "|---|---|---|---|", *rows]
    return "\n".join(lines)


def main() -> int:
    text = PAGE.read_text()
    made = f"{BEGIN}\n\n{diagram()}\n\n{END}"
    wanted = re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: made, text, flags=re.DOTALL)
    if "--check" in sys.argv[1:]:
        return int(wanted != text)
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
