"""`weightsync status` on a terminal of 100 columns, made from the plain data of `weightsync status --json`.

Problems come as sentences below the tables, where nothing is cut off.
"""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.text import Text

from weightsync.cli.views import coloured, decimal_size, empty_table, or_dash

__all__ = ["status_view"]

_OVER_BYTES = ("fill", "wire", "load")  # phases in which the bytes of a push move


def status_view(status: dict[str, Any], clock: str) -> Group:
    """Return a daemon's status as tables and sentences; `clock` is the time to show."""
    head = f"{status['software']} on node {status['node']}, pid {status['pid']}, up {_lasting(status['uptime'])}"
    parts: list[Any] = [Text(f"{head}, at {clock}"), Text(), _engines(status), Text(), _bridges(status)]
    if status["nodes"]:
        parts += [Text(), _nodes(status["nodes"])]
    if status["keepers"]:
        parts += [Text(), *(_keeper(keeper) for keeper in status["keepers"])]
    wrong = list(_wrong(status))
    if wrong:
        parts += [Text(), *wrong]
    return Group(*parts, Text(), *_under_way(status), *_waiting(status), *_last_push(status), *_refused(status))


def _engines(status: dict[str, Any]) -> Any:
    engines = empty_table("engine", "node", "model", "kind", "state", "serves", "tp", "url")
    for e in status["engines"]:
        model = f"{e['model']} (frozen)" if e["frozen"] else e["model"]
        version, tp = or_dash(e["version"]), or_dash(e["tp_size"])
        engines.add_row(e["name"], e["node"], model, e["kind"], coloured(e["state"]), version, tp, e["url"])
    return engines


def _bridges(status: dict[str, Any]) -> Any:
    bridges = empty_table("bridge", "pid", "slots", "taken", "on", "exports", "open", "revoked", "restarts")
    for b in status["bridges"]:
        slots = f"{b['slots']} × {b['slot_bytes'] / 2**20:g} MiB"
        place = f"GPU {b['gpu'].partition('-')[0]}" if b["gpu"] else "host"
        counts = [str(b[key]) for key in ("exports", "outstanding", "revoked", "restarts")]
        bridges.add_row(f"{b['node']}/{b['index']}", or_dash(b["pid"]), slots, str(b["taken"]), place, *counts)
    return bridges


def _nodes(nodes: list[dict[str, Any]]) -> Any:
    table = empty_table("peer", "engines", "bridges", "slots on", "endpoint", "state")
    for node in nodes:
        place = {"cuda": "GPUs", "cpu": "host"}.get(node["device"], "–")
        state = coloured(node["state"])
        table.add_row(node["node"], str(node["engines"]), str(node["bridges"]), place, node["endpoint"], state)
    return table


def _keeper(keeper: dict[str, Any]) -> Text:
    process = f"pid {keeper['pid']}" if keeper["pid"] is not None else "not running"
    kept = (
        f"version {keeper['version']}, {decimal_size(keeper['nbytes'])}" if keeper["version"] is not None else "nothing"
    )
    return Text(f"keeper of {keeper['model']} ({process}) keeps {kept}, for engines that come late")


def _wrong(status: dict[str, Any]) -> Any:
    for engine in status["engines"]:
        if engine["error"]:
            yield Text(f"engine {engine['name']}: {engine['error']}", style="red")
    for bridge in status["bridges"]:
        name = f"bridge {bridge['node']}/{bridge['index']}"
        if bridge["error"] and bridge["pid"] is None:
            yield Text(f"{name}: {bridge['error']}", style="red")
        elif bridge["error"]:  # it is ready again
            yield Text(f"{name}: last restart: {bridge['error']}", style="yellow")
        if bridge["holding"] and status["push"] is None and status["follows"] is None:
            readers = ", ".join(f"{reader} {count}" for reader, count in bridge["holding"].items())
            yield Text(f"{name}: exports that were not closed, with no push under way: {readers}", style="red")
    if status["seed"]:
        yield Text(f"cluster.seed is not reached, so nodes that come stay unknown: {status['seed']}", style="red")
    if status["leaks"]:
        yield Text(f"{status['leaks']} exports were never given back since the start, and were revoked", style="red")
    needs = sum(b["slots"] * b["slot_bytes"] for b in status["bridges"])
    if status["device"] == "cpu" and status["shm_free"] is not None and status["shm_free"] < needs // 20:
        yield Text(f"shared memory is nearly full: {decimal_size(status['shm_free'])} free", style="yellow")


def _under_way(status: dict[str, Any]) -> list[Text]:
    push, follows = status["push"], status["follows"]
    if push is None and follows is not None:
        what = f"version {follows['version']} of {follows['model']}" if follows["model"] else f"push {follows['push']}"
        return [Text(f"takes part in {what}, which another node pushes, for {follows['seconds']:.1f} s")]
    if push is None:
        return [Text("no push is under way")]
    share = 100 * push["filled_bytes"] / push["nbytes"] if push["nbytes"] else 0
    what = f"pushing version {push['version']} of {push['model']}: {push['state']} for {push['seconds']:.1f} s"
    lines = [f"{what}, {decimal_size(push['filled_bytes'])} of {decimal_size(push['nbytes'])} filled ({share:.0f} %)"]
    if push["waiting_for"]:
        lines.append(f"  waiting for {push['waiting_for']}")
    lines += [f"  {e['engine']}: {e['stage']}, {e['loaded']} of {push['buckets']} buckets" for e in push["engines"]]
    return [Text(line) for line in lines]


def _waiting(status: dict[str, Any]) -> list[Text]:
    count = status["waiting"]
    return [Text(f"calls of push_weights that wait for this node to be free: {count}")] if count else []


def _last_push(status: dict[str, Any]) -> list[Any]:
    last, error = status["last"], status["last_error"]
    if last is None:
        return []
    ago = f", {_lasting(status['last_ago'])} ago" if status["last_ago"] is not None else ""
    what = f"last push{ago}: version {last['version']} of {last['model']}"
    size = f"{decimal_size(last['nbytes'])} in {last['buckets']} buckets, {last['seconds']:.3f} s"
    outcomes = Text("  " + ", ".join(f"{e['engine']} {e['outcome']}" for e in last["engines"]))
    if error is not None:
        hint = [Text(f"  hint: {error['hint']}")] if error.get("hint") else []
        return [Text(f"{what} failed after {last['seconds']:.3f} s: {error['message']}", style="red"), *hint, outcomes]
    phases = empty_table("  phase", "seconds", "GB/s", right=(1, 2))
    for name, seconds in last["phases"].items():
        moves = name in _OVER_BYTES and seconds > 0
        phases.add_row(f"  {name}", f"{seconds:.4f}", f"{last['nbytes'] / seconds / 1e9:.2f}" if moves else "")
    speed = f", {last['nbytes'] / last['seconds'] / 1e9:.2f} GB/s" if last["seconds"] else ""
    return [Text(f"{what}: {size}{speed}"), phases, outcomes]


def _refused(status: dict[str, Any]) -> list[Text]:
    error = status["refused"]
    if error is None:
        return []
    ago, what = _lasting(status["refused_ago"]), f"version {error['version']} of {error['model']}"
    hint = [Text(f"  hint: {error['hint']}")] if error.get("hint") else []
    return [
        Text(
            f"last push_weights call refused before it started, {ago} ago: {what}: {error['message']}", style="yellow"
        ),
        *hint,
    ]


def _lasting(seconds: float) -> str:
    """Return seconds in a form for people: "5 min"."""
    whole = int(seconds)
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if whole >= 2 * unit:
            return f"{whole // unit} {name}"
    return f"{whole} s"
