"""The dashboard and the alert rules ask only for metrics and labels that exist."""

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

from immich_ml_metal.cli.output import Exit
from immich_ml_metal.metrics import Metrics, merge

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
RULES = yaml.safe_load((DEPLOY / "prometheus-alerts.yml").read_text())["groups"][0]["rules"]
_FROM_PROMETHEUS = {"job", "instance", "le"}


def full_metrics() -> str:
    """Every series once: a metric with labels shows only after its first use."""
    metrics = Metrics()
    for instrument in vars(metrics).values():
        names = getattr(instrument, "_labelnames", None)
        if not names:
            continue
        child = instrument.labels(*("x" for _ in names))
        (child.observe if hasattr(child, "observe") else child.inc)(1)
    return merge({"gateway": metrics.render()}).decode()


def known() -> dict[str, set[str]]:
    series: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(full_metrics()):
        for sample in family.samples:
            series.setdefault(sample.name, set()).update(sample.labels)
    return series


SERIES = known()


def panels() -> Iterator[dict[str, Any]]:
    yield from (panel for panel in DASHBOARD["panels"] if panel["type"] != "row")


def expressions() -> list[str]:
    from_panels = [target["expr"] for panel in panels() for target in panel["targets"]]
    return from_panels + [rule["expr"] for rule in RULES]


@pytest.mark.parametrize("expr", expressions())
def test_an_expression_names_series_and_labels_that_exist(expr: str) -> None:
    names = re.findall(r"\bimmich_ml_\w+", expr)
    assert names or expr.startswith("up{")
    labels = {label for name in names for label in SERIES[name]} | _FROM_PROMETHEUS
    matchers = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expr)
    grouped = [
        name for group in re.findall(r"\bby\s*\(([^)]*)\)", expr) for name in group.split(",")
    ]
    assert {name.strip() for name in [*matchers, *grouped]} <= labels
    assert expr.count("(") == expr.count(")")
    assert expr.count("{") == expr.count("}")


def test_every_series_of_ours_is_on_the_dashboard() -> None:
    shown = " ".join(target["expr"] for panel in panels() for target in panel["targets"])
    bases = {re.sub(r"_(bucket|count|sum|created)$", "", name) for name in SERIES}
    assert [base for base in sorted(bases) if base not in shown] == []


def test_counters_are_rated_and_gauges_are_not() -> None:
    for expr in expressions():
        for name, after in re.findall(r"(immich_ml_\w+)(?:\{[^}]*\})?(\[)?", expr):
            cumulative = name.endswith(("_total", "_bucket", "_sum", "_count"))
            assert bool(after) == cumulative, expr


def test_no_two_panels_overlap_and_all_have_a_data_source() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels())
    for a, b in combinations([panel["gridPos"] for panel in DASHBOARD["panels"]], 2):
        apart_x = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        apart_y = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert apart_x or apart_y
        assert a["x"] + a["w"] <= 24


def test_every_alert_says_what_to_do() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(names) == len(set(names)) >= 8
    for rule in RULES:
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["action"]


def test_every_exit_code_is_documented() -> None:
    text = (DEPLOY.parent / "docs" / "operate.md").read_text()
    assert [code for code in Exit if f"| {code.value} |" not in text] == []
