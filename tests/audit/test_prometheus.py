"""Metrics as Prometheus has them: names by its rules, present values, rules and dashboard that fit what is served."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from isolator import __version__
from isolator.audit.families import text
from isolator.audit.metrics import Metrics
from isolator.audit.record import Incoming

FOLDER = Path(__file__).resolve().parents[2] / "docs/prometheus"
PROMTOOL = shutil.which("promtool", path=f"{os.environ['PATH']}:/opt/isolator-dev/tools")
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="no promtool: not a Debian host, or no network at the set-up"
)
PLUGINS = {
    "a": {
        "state": "running", "paused": True, "memory": 1 << 28, "cpu": 0.25, "tasks": 64, "open_files": 1024,
        "oldest": time.time() - 100,
    },
    "b": {"state": "rejected", "paused": False},
}  # fmt: skip


def _text(metrics: Metrics) -> str:
    return text(metrics.families())


def _filled() -> Metrics:
    metrics = Metrics()
    metrics.gauges({"plugins": PLUGINS, "queue": {"a": 3}})
    for kind, data in {
        "event.accepted": {"event": "deploy.completed"},
        "event.dispatched": {"queued_us": 5},
        "event.response": {"outcome": "ok", "latency_us": 5},
        "event.dead": {},
        "plugin.started": {"reason": "restart"},
        "plugin.crashed": {},
        "net.denied": {},
        "net.closed": {"sent": 1, "received": 1},
        "resources": {"memory": 1, "memory_peak": 1, "cpu_us": 1, "throttled_us": 1, "tasks": 1, "open_files": 1},
    }.items():
        metrics.observe(Incoming("", kind, "a", data=data))
    return metrics


def test_what_the_host_knows_is_served_as_it_is_at_present() -> None:
    metrics = _filled()
    text = _text(metrics)
    for line in (
        f'isolator_build_info{{version="{__version__}"}} 1.0',
        'isolator_plugin_state{plugin="a",state="running"} 1.0',
        'isolator_plugin_state{plugin="b",state="rejected"} 1.0',
        'isolator_plugin_paused{plugin="a"} 1.0',
        'isolator_plugin_limit_memory_bytes{plugin="a"} 268435456.0',
        'isolator_plugin_limit_cpu_cores{plugin="a"} 0.25',
        'isolator_dead_letters_total{plugin="b"} 0.0',
        'isolator_queue_oldest_seconds{plugin="b"} 0.0',
    ):
        assert f"{line}\n" in text, line
    age = re.search(r'isolator_queue_oldest_seconds\{plugin="a"\} (\S+)', text)
    assert age is not None and float(age[1]) >= 100
    assert 'limit_memory_bytes{plugin="b"}' not in text, "nobody knows it"
    metrics.gauges({"plugins": {"a": {"state": "failed"}, "b": None}})
    states = re.findall(r"isolator_plugin_state\{(.*)\}", _text(metrics))
    assert states == ['plugin="a",state="failed"']
    assert "_created" not in text


def test_every_metric_goes_on_in_the_audit_process_that_takes_the_place_of_another() -> None:
    before, after = _filled(), Metrics()
    before.committed(0.003, 7)
    after.take_over(before.pass_on())
    lines = [line for line in _text(before).splitlines() if "oldest" not in line]  # that is an age
    assert [line for line in lines if line not in _text(after).splitlines()] == []
    assert 'isolator_delivery_seconds_bucket{le="0.0005",plugin="a"} 1.0' in lines


def test_seconds_of_the_processor_grow_over_runs_and_an_exchange_of_the_audit_process() -> None:
    metrics = Metrics()

    def seconds() -> float:
        found = re.search(r'isolator_plugin_cpu_seconds_total\{plugin="a"\} (\S+)', _text(metrics))
        assert found is not None
        return float(found[1])

    figures = []
    for step in (2_000_000, 5_000_000, "start", 6_000_000, "exchange", 7_000_000, 1_000_000):
        if step == "start":
            metrics.observe(Incoming("", "plugin.started", "a"))
        elif step == "exchange":
            before, metrics = metrics, Metrics()
            metrics.take_over(before.pass_on())
        else:
            metrics.observe(Incoming("", "resources", "a", data={"cpu_us": step}))
            figures.append(seconds())
    assert figures == [2.0, 5.0, 11.0, 12.0, 13.0]


def test_official_parser_reads_every_family_and_label_as_it_was_meant() -> None:
    metrics = _filled()
    metrics.observe(Incoming("", "event.accepted", data={"event": 'odd " \\ \n name'}))
    read = {family.name: family for family in text_string_to_metric_families(_text(metrics))}
    served = [family for family in metrics.families() if family.children]
    assert {family.name.removesuffix("_total") for family in served} <= read.keys()
    for family in served:
        found = read[family.name.removesuffix("_total")]
        assert (found.type, found.documentation) == (family.kind, family.meaning)
        shown = [(sample.name, sample.labels, sample.value) for sample in found.samples]
        if family.name != "isolator_queue_oldest_seconds":  # that is an age
            assert shown == list(family.samples())
    buckets = [sample.value for sample in read["isolator_delivery_seconds"].samples if "_bucket" in sample.name]
    assert buckets == sorted(buckets) and buckets[-1] == 1


@needs_promtool
def test_only_what_is_marked_as_old_breaks_the_rules_of_names() -> None:
    text = _text(_filled())
    command = [str(PROMTOOL), "check", "metrics"]
    found = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    faults = {line.split()[0] for line in (found.stdout + found.stderr).splitlines() if line.startswith("isolator_")}
    old = set(re.findall(r"^# HELP (\S+) Old: ", text, re.M))
    assert faults == old == {"isolator_plugin_cpu_microseconds", "isolator_plugin_throttled_microseconds"}


def _used(text: str) -> set[str]:
    return set(re.findall(r"isolator_[a-z_]+", text))


def _served() -> set[str]:
    text = _text(_filled())
    return {name for name in re.findall(r"^(isolator_\w+)", text, re.M)}


@needs_promtool
def test_alert_rules_fit_the_metrics_and_pass_their_tests() -> None:
    for words in (("check", "rules", "alerts.yml"), ("test", "rules", "alerts.test.yml")):
        ran = subprocess.run([str(PROMTOOL), *words], cwd=FOLDER, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr
    expressions = re.findall(r"expr: (.*)", (FOLDER / "alerts.yml").read_text())
    assert _used(" ".join(expressions)) <= _served()
    alerts = set(re.findall(r"alert: (\w+)", (FOLDER / "alerts.yml").read_text()))
    tests = (FOLDER / "alerts.test.yml").read_text()
    assert alerts == set(re.findall(r"alertname: (\w+), exp_alerts", tests)), "each alert has a test in which it fires"


@needs_promtool
def test_dashboard_asks_for_what_is_served(tmp_path: Path) -> None:
    board = json.loads((FOLDER / "dashboard.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert _used(" ".join(asked)) <= _served()
    rules = [
        {"record": f"panel:{number}", "expr": one.replace("$__rate_interval", "5m").replace("$plugin", ".*")}
        for number, one in enumerate(asked)
    ]
    file = tmp_path / "panels.yml"
    file.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    ran = subprocess.run([str(PROMTOOL), "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
