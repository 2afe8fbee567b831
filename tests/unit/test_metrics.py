"""What is exported, and what the dashboard and the alerts make of it."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from weightsync.config import parse_node_config
from weightsync.errors import ErrorRecord, TransportBroken
from weightsync.ipc.ledger import Account
from weightsync.nccl_bridge.commands import LedgerBooks
from weightsync.wire import messages as msg
from weightsyncd.context import PushContext
from weightsyncd.health import measure_node, measure_push
from weightsyncd.metrics import Metrics

DEPLOY = Path(__file__).parent.parent.parent / "docs" / "deploy"
LEFT_OUT: dict[str, str] = {}  # metrics that the dashboard does not show → why not
_SAMPLES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
_FROM_SCRAPING = {"job", "instance"}


class Use(NamedTuple):
    """One expression, and the labels that its texts speak of."""

    where: str
    expression: str
    spoken: frozenset[str]


def series() -> dict[str, frozenset[str]]:
    """Every series that weightsyncd exports, and its labels."""
    found = {}
    for metric in vars(Metrics()).values():
        if isinstance(metric, MetricWrapperBase):
            for suffix in _SAMPLES[str(metric._type)]:
                more = {"le"} if suffix == "_bucket" else set()
                found[metric._name + suffix] = frozenset({*metric._labelnames, *more})
    return found


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    return loaded


def alerts() -> list[dict[str, Any]]:
    return [r for g in yaml.safe_load((DEPLOY / "prometheus-alerts.yaml").read_text())["groups"] for r in g["rules"]]


def uses() -> list[Use]:
    found = []
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            spoken = frozenset(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            found.append(Use(panel["title"], target["expr"], spoken))
    for rule in alerts():
        texts = " ".join(rule["annotations"].values())
        found.append(Use(rule["alert"], rule["expr"], frozenset(re.findall(r"\$labels\.(\w+)", texts))))
    return found


def selectors(expression: str) -> list[tuple[str, set[str]]]:
    """Each series that an expression reads, and the labels by which it chooses."""
    found = re.findall(r"\b(weightsync_\w+|up)\b(?:\{([^}]*)\})?", expression)
    return [(name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", chosen))) for name, chosen in found]


@pytest.mark.parametrize("use", uses(), ids=lambda use: use.where)
def test_every_series_and_label_in_it_is_exported(use):
    known = {**series(), "up": frozenset()}
    read = selectors(use.expression)
    assert read, "it reads nothing of ours"
    for name, labels in read:
        assert name in known, name
        assert labels <= known[name] | _FROM_SCRAPING, name
    there = set().union(*(known[name] for name, _ in read)) | _FROM_SCRAPING
    grouped = re.findall(r"\b(by|on|ignoring)\s*\(([^)]*)\)", use.expression)
    for _, labels in grouped:
        assert {label.strip() for label in labels.split(",")} <= there
    kept = [{label.strip() for label in labels.split(",")} for word, labels in grouped if word == "by"]
    shown = set().union(*kept) if kept else there if not re.match(r"(sum|count|max|min)\b", use.expression) else set()
    assert use.spoken <= shown, "a text speaks of a label that the result does not have"


def test_every_metric_is_shown_or_left_out_for_a_reason():
    shown = {
        name for panel in dashboard()["panels"] for t in panel.get("targets", ()) for name, _ in selectors(t["expr"])
    }
    exported = {
        metric._name: metric._type for metric in vars(Metrics()).values() if isinstance(metric, MetricWrapperBase)
    }
    missing = {name for name, kind in exported.items() if not {name + suffix for suffix in _SAMPLES[str(kind)]} & shown}
    assert missing == LEFT_OUT.keys()


def test_panels_have_names_of_their_own_and_do_not_overlap():
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not taken & cells, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_variables_of_the_dashboard_are_there():
    document = dashboard()
    named = {variable["name"] for variable in document["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(document["panels"])))
    assert used == named


def test_every_alert_says_what_it_is_and_what_to_do():
    rules = alerts()
    assert len({rule["alert"] for rule in rules}) == len(rules) > 5
    page = (DEPLOY.parent / "operating.md").read_text()
    for rule in rules:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"]
        assert f"`{rule['alert']}`" in page, rule["alert"]


def test_the_first_failure_of_a_model_is_a_rise():
    """A counter that begins at 1 has not risen, for Prometheus."""
    metrics = Metrics(["policy"])
    labels = {"model": "policy", "kind": "PushAborted"}
    assert metrics.registry.get_sample_value("weightsync_push_failures_total", labels) == 0.0
    labels = {"model": "policy", "outcome": "torn"}
    assert metrics.registry.get_sample_value("weightsync_pushes_total", labels) == 0.0


def test_so_it_is_of_a_model_that_comes_later_and_of_an_engine(node):
    """By `weightsync engines add`, or with another node: the node of a trainer may have no engine of its own."""
    node.peers["n1"].engines += (FakeEngine("e3", None, "late"), FakeEngine("kept", 1, "reward", frozen=True))
    asyncio.run(measure_node(node))
    value = node.metrics.registry.get_sample_value
    for model in ("policy", "late"):
        assert value("weightsync_push_failures_total", {"model": model, "kind": "PushAborted"}) == 0.0
        assert value("weightsync_pushes_total", {"model": model, "outcome": "torn"}) == 0.0
    assert value("weightsync_push_failures_total", {"model": "reward", "kind": "PushAborted"}) is None
    for engine in ("e0", "e3"):
        assert value("weightsync_engine_outcomes_total", {"engine": engine, "outcome": "torn"}) == 0.0
    for engine in ("ref", "kept"):  # frozen: nothing is pushed to it
        assert value("weightsync_engine_outcomes_total", {"engine": engine, "outcome": "torn"}) is None


class FakeBridge:
    def __init__(self, index: int, *accounts: Account) -> None:
        self.name, self.restarts, self.config = f"n0/{index}", index, SimpleNamespace(index=index)
        self.accounts: tuple[Account, ...] | None = accounts  # None: it does not answer

    async def call(self, command: object, deadline: float) -> LedgerBooks:
        if self.accounts is None:
            raise TransportBroken(f"bridge {self.name} is not ready")
        return LedgerBooks(accounts=self.accounts)


class FakeEngine:
    def __init__(self, name: str, version: int | None, model: str = "policy", frozen: bool = False) -> None:
        self.name, self.version, self.model, self.frozen = name, version, model, frozen
        self.state, self.info = "serving", SimpleNamespace(version=version, replay=None)

    def status(self, node: str) -> FakeEngine:
        return self


@pytest.fixture
def node(tmp_path) -> Any:
    """Two bridges, three engines, and another node with two."""
    books = Account(reader="e0/0", exports=5, opens=5, closes=4), Account(reader="e0/0", exports=3, closes=3)
    away = SimpleNamespace(info=None, engines=(FakeEngine("e2", None), FakeEngine("old", 1, "other")))
    return SimpleNamespace(
        config=parse_node_config(f'[node]\nshm_dir = "{tmp_path}"'),
        metrics=Metrics(),
        engines=[FakeEngine("e0", 7), FakeEngine("e1", 6), FakeEngine("ref", 1, frozen=True)],
        peers={"n1": away},
        trainers=SimpleNamespace(push=None, newest={"policy": 7}),
        follower=SimpleNamespace(context=None),
        executor=SimpleNamespace(exports=SimpleNamespace(leaks=2)),
        bridges=[FakeBridge(0, books[0]), FakeBridge(1, books[1])],
    )


def test_a_node_is_measured(node):
    """Books of several bridges add up; engines everywhere are compared with what was pushed from here."""
    asyncio.run(measure_node(node))
    value = node.metrics.registry.get_sample_value
    assert value("weightsync_exports", {"reader": "e0/0"}) == 8
    assert value("weightsync_exports_outstanding", {"reader": "e0/0"}) == 1
    assert value("weightsync_engines_behind", {"model": "policy"}) == 2
    assert value("weightsync_newest_version", {"model": "policy"}) == 7
    assert value("weightsync_peer_connected", {"peer": "n1"}) == 0
    assert value("weightsync_exports_leaked") == 2
    assert value("weightsync_slots", {"bridge": "n0/1"}) == 3
    assert value("weightsync_shm_free_bytes")
    node.peers = {}
    asyncio.run(measure_node(node))
    assert value("weightsync_peer_connected", {"peer": "n1"}) is None


def test_a_push_that_another_node_coordinates_is_under_way_here(node):
    value = node.metrics.registry.get_sample_value
    asyncio.run(measure_node(node))
    assert value("weightsync_push_under_way_seconds") == 0
    node.follower.context = PushContext("n1-ab", "policy", 3, since=time.monotonic() - 7)
    asyncio.run(measure_node(node))
    assert 7 <= value("weightsync_push_under_way_seconds") < 60


def test_readers_that_are_gone_are_shown_no_more(node):
    """A gauge that stays at what a bridge's last books said would be exports that nobody holds."""

    def outstanding() -> Any:
        asyncio.run(measure_node(node))
        return node.metrics.registry.get_sample_value("weightsync_exports_outstanding", {"reader": "e0/0"})

    first, second = node.bridges
    assert outstanding() == 1
    kept, first.accounts = first.accounts, None
    assert outstanding() == 1  # that it does not answer does not say that its books are empty
    first.accounts = kept
    assert outstanding() == 1
    first.accounts = ()  # a new bridge, of a new ledger
    assert outstanding() == 0
    second.accounts = ()
    assert outstanding() is None
    names = ("weightsync_exports", "weightsync_exports_opened", "weightsync_exports_closed")
    assert {node.metrics.registry.get_sample_value(name, {"reader": "e0/0"}) for name in names} == {None}


def test_outcomes_of_engines_that_are_gone_are_shown_no_more(node):
    """Engines of other nodes are pushed to from here, too."""

    def outcomes() -> dict[str, float]:
        asyncio.run(measure_node(node))
        (family,) = [f for f in node.metrics.registry.collect() if f.name == "weightsync_engine_outcomes"]
        return {
            s.labels["engine"]: s.value
            for s in family.samples
            if s.labels.get("outcome") == "skipped"
            if s.name.endswith("_total")
        }

    measure_push(node.metrics, ended(), outcome_of("e0", "e2", "removed"), repeat=False)
    assert outcomes() == {"e0": 1, "e1": 0, "e2": 1, "old": 0}
    node.peers = {}
    assert outcomes() == {"e0": 1, "e1": 0}


def test_a_keepers_push_that_fails_is_no_failure_of_push_weights(node):
    labels = {"model": "policy", "kind": "PushAborted"}
    for repeat, count in ((True, None), (False, 1), (True, 1)):
        measure_push(node.metrics, ended(ErrorRecord(kind="PushAborted", message="no")), None, repeat=repeat)
        assert node.metrics.registry.get_sample_value("weightsync_push_failures_total", labels) == count


def ended(error: ErrorRecord | None = None) -> Any:
    """The session of a push that has."""
    return SimpleNamespace(model="policy", state="aborted", error=error, committed=False)


def outcome_of(*engines: str) -> msg.PushOutcome:
    each = tuple(
        msg.EngineOutcome(engine=name, node="n0", outcome="skipped", version=None, seconds=0.0) for name in engines
    )
    return msg.PushOutcome(
        model="policy", version=3, nbytes=0, tensors=0, buckets=0, seconds=0.0, phases={}, engines=each
    )
