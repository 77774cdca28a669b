"""The alerts and the dashboard of cluster/manifests: each expression is PromQL, and asks for metrics and labels that a
server has."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from headwise.runtime.handoff.receiving import Cause
from headwise.runtime.routing.router import Router
from headwise.runtime.server.metrics import Metrics
from tests.runtime.server.test_deployment import replica

MANIFESTS = Path(__file__).parents[3] / "cluster" / "manifests"
BOARD = json.loads((MANIFESTS / "grafana-dashboard.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
RULES = [
    rule
    for group in yaml.safe_load((MANIFESTS / "prometheus-rules.yaml").read_text())["groups"]
    for rule in group["rules"]
]
OF_PROMETHEUS = {"instance", "job"}
"""Labels that Prometheus gives to whatever it scrapes."""


def stats() -> dict[str, Any]:
    """What an engine says that has all there is: tiers, a spare, both sides of handoffs, a death."""
    tier = {"queried_tokens": 1, "hit_tokens": 1, "inserted_tokens": 1, "evictions": {"lru": 1}}
    cache = tier | {
        "blocks": {"free": 1},
        "duplicate_blocks": 0,
        "integrity_checks": 1,
        "tiers": {"host": tier, "disk": tier},
    }
    decode = {
        "role": "decode",
        "committed": 1,
        "cancelled": 0,
        "causes": {Cause.PEER.value: 1},
        "bytes": 1,
        "tokens": 1,
    }
    decode |= {
        "seconds": 1.0,
        "in_flight": 0,
        "reserved_blocks": 0,
        "oldest_s": 0.0,
        "peers": {"a": {"connected": True}},
    }
    prefill = {"role": "prefill", "committed": 1, "failed": 0, "pushes": 1, "push_failures": 0, "bytes": 1}
    prefill |= {"push_seconds": 1.0, "hidden_seconds": 1.0, "in_flight": 0}
    recoveries = {"rebuilding": False, "count": 1, "last_seconds": 1.0, "deaths_by_rank": {"0": 1}, "spare": "ready"}
    counts = dict.fromkeys(("num_running", "num_waiting", "num_steps", "num_generated_tokens", "num_preemptions"), 1)
    engine = {"num_blocks": 2, "num_free_blocks": 1, "epoch": 1, "prefix_cache": cache, "recoveries": recoveries}
    replicas = {"replicas": [replica(1)], "routing": Router(16).stats()}
    return engine | counts | replicas | {"handoff": decode, "prefill": {"handoff": prefill}}


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """The labels of each metric, by its name as Prometheus has it."""
    metrics = Metrics(stats)
    metrics.requests.labels("OK")
    metrics.tokenizations.labels("OK")
    labels: dict[str, set[str]] = {}
    for sample in itertools.chain.from_iterable(family.samples for family in metrics.registry.collect()):
        labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def asked(expression: str) -> Iterator[tuple[str, set[str]]]:
    """The metrics that an expression selects, each with the labels that it is selected by.

    Raises:
        ValueError: it is no PromQL.
    """
    found: list[tuple[str, set[str]]] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append((node.name, {matcher.name for matcher in node.matchers.matchers}))
        if isinstance(node, promql_parser.MatrixSelector):
            visit(node.vector_selector)

    promql_parser.walk(promql_parser.parse(expression), visit)
    yield from found


def grouped(expression: str) -> set[str]:
    return {label for labels in re.findall(r"\bby \(([^)]*)\)", expression) for label in re.split(r", *", labels)}


def check(expression: str, exported: dict[str, set[str]], shown: str) -> None:
    """
    Args:
        shown: text in which {{label}}, or {{ $labels.label }}, stands for a label of the result.
    """
    selected = list(asked(expression))
    assert selected
    labels = set(OF_PROMETHEUS)
    for name, matchers in selected:
        assert name in exported, f"no metric {name}"
        labels |= exported[name]
        assert matchers <= exported[name] | OF_PROMETHEUS, name
    assert grouped(expression) <= labels
    kept = grouped(expression) if "by (" in expression else labels
    if "absent(" in expression or re.search(r"\bsum\(", expression):
        kept = set()
    assert set(re.findall(r"\{\{ *(?:\$labels\.)?([a-z]+) *\}\}", shown)) <= kept, shown


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert(rule: dict[str, Any], exported: dict[str, set[str]]) -> None:
    assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"Headwise\w+", rule["alert"])
    assert promql_parser.parse_duration(rule.get("for", "1m"))
    assert rule["labels"].keys() == {"severity"} and rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"].keys() == {"summary"}
    check(rule["expr"], exported, rule["annotations"]["summary"])


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel(panel: dict[str, Any], exported: dict[str, set[str]]) -> None:
    for target in panel["targets"]:
        assert '{instance=~"$instance"' in target["expr"]
        expression = target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*")
        assert "$" not in expression
        check(expression, exported, target["legendFormat"])


def test_the_dashboard_has_its_panels_side_by_side() -> None:
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    places = [panel["gridPos"] for panel in BOARD["panels"]]
    for one, other in itertools.combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    assert all(panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"} for panel in PANELS)


def test_every_metric_that_tells_of_trouble_has_an_alert_or_a_panel(exported: dict[str, set[str]]) -> None:
    texts = [target["expr"] for panel in PANELS for target in panel["targets"]] + [rule["expr"] for rule in RULES]
    names = set(re.findall(r"headwise_\w+", " ".join(texts)))
    trouble = {
        name
        for name in exported
        if re.search(r"death|recover|rebuild|spare|up$|connected|preempt|handoffs_total", name)
    }
    assert trouble <= names


@pytest.mark.parametrize(
    "expression",
    [
        "rate(headwise_steps_total)",
        "headwise_stepz_total",
        'headwise_epoch{rank="0"}',
        "sum by (rank) (headwise_epoch)",
    ],
)
def test_what_is_wrong_is_found(expression: str, exported: dict[str, set[str]]) -> None:
    """No PromQL; no such metric; no such label, twice."""
    with pytest.raises((ValueError, AssertionError)):
        check(expression, exported, "")
