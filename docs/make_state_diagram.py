"""Writes the diagrams of docs/session.md and docs/concepts.md, and the tables of docs/session.md.

They are made from `weightsync.session.machine.TRANSITIONS`.

python docs/make_state_diagram.py            write
python docs/make_state_diagram.py --check    write nothing; exit status 1 if a page is out of date
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from weightsync.session.machine import TRANSITIONS, State

HERE = Path(__file__).parent
BEGIN, END = "<!-- made by make_state_diagram.py -->", "<!-- end -->"


def edges() -> dict[tuple[State, State], list[str]]:
    """Return the events by which one state leads to another, by pair of states."""
    found: dict[tuple[State, State], list[str]] = {}
    for (state, event), (rule, follows) in TRANSITIONS.items():
        for target in follows:
            if rule.__name__ != "ignore" and target is not state:
                found.setdefault((state, target), []).append(event.__name__)
    return found


def diagram(*, events: bool) -> str:
    """Return the states, and the events that lead from one to another, as Mermaid."""
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {State.OPENING}"]
    for (state, target), names in edges().items():
        label = ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} more"
        lines.append(f"    {state} --> {target}" + (f": {label}" if events else ""))
    lines += [f"    {state} --> [*]" for state in State if state.ended]
    return "\n".join([*lines, "```"])


def rows(state: State) -> list[tuple[str, str, str]]:
    """Return a row for each event in a state: the event, the rule that decides, the states that may follow."""
    return [
        (
            f"`{event.__name__}`",
            f"`{rule.__module__.rpartition('.')[2]}.{rule.__name__}`",
            ", ".join(str(s) for s in dict.fromkeys(follows)),
        )
        for (of, event), (rule, follows) in TRANSITIONS.items()
        if of is state and rule.__name__ != "ignore"
    ]


def folded(title: str, lines: list[str]) -> list[str]:
    """Return a table that is folded behind a line with its title."""
    return ["", f"<details markdown><summary>{title}</summary>", "", *lines, "", "</details>"]


def tables() -> str:
    """Return the table of events that change the state; folded, those that do not, and those of ended pushes."""
    moving = ["| state | event | decided by | may lead to |", "|---|---|---|---|"]
    staying = ["| state | event | decided by |", "|---|---|---|"]
    for state in (s for s in State if not s.ended):
        for event, rule, after in rows(state):
            line = f"| {state} | {event} | {rule} |"
            (moving if after else staying).append(f"{line} {after} |" if after else line)
    ends = [state for state in State if state.ended]
    if any(rows(state) != rows(ends[0]) for state in ends):
        raise SystemExit("the states that end a push differ in what they hear: give each a table of its own")
    ended = ["| event | decided by |", "|---|---|", *(f"| {event} | {rule} |" for event, rule, _ in rows(ends[0]))]
    last = ", ".join(ends[:-1]) + f" or {ends[-1]}"
    lines = [
        *moving,
        *folded("Events that change what the session knows, but not its state", staying),
        *folded(f"Events of a push that has ended ({last})", ended),
    ]
    return "\n".join(lines)


def main() -> int:
    pages = {
        HERE / "session.md": f"{diagram(events=True)}\n\n{tables()}",
        HERE / "concepts.md": diagram(events=False),
    }
    stale = 0
    for page, made in pages.items():
        text = page.read_text()
        between = f"{re.escape(BEGIN)}.*{re.escape(END)}"
        wanted = re.sub(between, lambda _, made=made: f"{BEGIN}\n\n{made}\n\n{END}", text, flags=re.DOTALL)
        stale += wanted != text
        if "--check" not in sys.argv[1:]:
            page.write_text(wanted)
    return int(stale > 0 and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
