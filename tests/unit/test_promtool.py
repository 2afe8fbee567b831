"""Alerts and dashboard as Prometheus itself takes them; most of it is skipped where `promtool` is not installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.unit.test_metrics import DEPLOY, alerts, dashboard

CASES = Path(__file__).parent.parent / "data" / "prometheus-alerts.test.yaml"
OF_GRAFANA = {"$__rate_interval": "1m", "$job": ".*", "$instance": ".*", "$model": ".*"}


def promtool(*arguments: str) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_where_it_fires_and_one_where_it_is_silent():
    cases = [case for each in yaml.safe_load(CASES.read_text())["tests"] for case in each["alert_rule_test"]]
    names = {rule["alert"] for rule in alerts()}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == names
    assert (CASES.parent / yaml.safe_load(CASES.read_text())["rule_files"][0]).samefile(
        DEPLOY / "prometheus-alerts.yaml"
    )


def test_alerts_are_valid_rules():
    promtool("check", "rules", str(DEPLOY / "prometheus-alerts.yaml"))


def test_alerts_fire_when_they_should_and_are_silent_when_they_should_be():
    promtool("test", "rules", str(CASES))


def test_expressions_of_the_dashboard_are_valid(tmp_path):
    rules = []
    for panel in dashboard()["panels"]:
        for number, target in enumerate(panel.get("targets", ())):
            expression = target["expr"]
            for name, value in OF_GRAFANA.items():
                expression = expression.replace(name, value)
            assert "$" not in expression
            rules.append({"record": re.sub(r"\W", "_", f"{panel['title']}_{number}"), "expr": expression})
    file = tmp_path / "dashboard.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", str(file))
