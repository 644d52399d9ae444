"""README's section on monitoring agrees with what `check` and `metrics` do."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from measured import HEALTHY
from recipes import README, recipe

from versioner_agent import metrics
from versioner_agent.checking import THRESHOLDS

RULES = recipe("alert rules")
KINDS = {family.name: family.kind for family in metrics.families(HEALTHY, {"version": "1"}, 1.0)}
LABELS = {
    family.name: {(name, value) for labels, _ in family.samples for name, value in labels.items()}
    for family in metrics.families(HEALTHY, {"version": "1"}, 1.0)
}


def test_every_metric_is_in_the_table_with_its_type():
    assert dict(re.findall(r"^\| `(versioner_agent_\w+)` \| (\w+) \|", README, re.MULTILINE)) == KINDS


def test_every_limit_is_in_the_table_with_its_default():
    for each in THRESHOLDS:
        assert f"`--{each.key.replace('_', '-')}` ({each.default})" in README


def test_alert_rules_have_the_form_of_a_rules_file():
    """Line by line: each rule is an alert with an expression, a severity and a summary, and nothing else."""
    head, *rules = re.split(r"(?m)^      - ", RULES)

    assert head == "groups:\n  - name: versioner-agent\n    rules:\n"
    for rule in rules:
        assert re.fullmatch(
            r"alert: Versioner\w+\n        expr: .+\n(?:        for: \d+[mh]\n)?"
            r"        labels: \{severity: (?:warning|critical)\}\n        annotations:\n          summary: [^:#]+\n",
            rule,
        ), rule
        assert rule.count("(") == rule.count(")")
    assert len({rule.split("\n")[0] for rule in rules}) == len(rules) >= 7


def test_alert_rules_speak_of_metrics_that_exist():
    expressions = re.findall(r"(?m)^        expr: (.+)$", RULES)
    named = set(re.findall(r"versioner_agent_\w+", " ".join(expressions)))

    assert named <= set(KINDS)
    for name, label, operator, values in re.findall(
        r'(versioner_agent_\w+)\{(\w+)(=~?)"([^"]+)"\}', " ".join(expressions)
    ):
        assert {(label, value) for value in values.split("|")} <= LABELS[name], operator


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool is installed")
def test_alert_rules_please_promtool(tmp_path):
    (tmp_path / "rules.yml").write_text(RULES)

    done = subprocess.run(
        ["promtool", "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool is installed")
def test_metrics_please_promtool():
    page = metrics.render(metrics.families(HEALTHY, {"version": "1"}, 1.0))

    done = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")
