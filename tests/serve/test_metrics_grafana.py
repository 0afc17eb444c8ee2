"""The dashboard shows metrics that there are, and can be shown itself."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

from jaxpaged import EngineStats
from jaxpaged.config import EngineConfig
from jaxpaged.memory import MemoryReport
from jaxpaged.serve.metrics import prometheus
from jaxpaged.serve.metrics.prometheus import PrometheusMetrics
from tests.serve.metrics_exposition import names, samples

DASHBOARD = json.loads(Path(prometheus.__file__).with_name("grafana.json").read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel.get("targets", ())]
WORDS = {"and", "or", "unless", "by", "on", "ignoring", "group_left", "le"}


def metric_names(expression: str) -> set[str]:
    """Names of the metrics that a PromQL expression asks for: what is no function, no word, no label, no range."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(?:by|on|ignoring)\s*\([^)]*\)", " ", expression)
    found = re.findall(r"(?<![\w:.$])([a-zA-Z_][\w:]*)(?!\s*\()(?![\w:])", bare)
    return {name for name in found if name not in WORDS}


def rendered_names() -> set[str]:
    """All that a server with a GPU exposes once it has been called."""
    metrics = PrometheusMetrics("m")
    metrics.set_engine(EngineConfig(dtype="float32", max_model_len=128), MemoryReport(1, 2, 3, 4, 5, 6, 7, 8))
    metrics.http("/v1/completions", "POST", 200, 0.1)
    metrics.refused("queue_full")
    return names(samples(metrics, EngineStats(device_memory_in_use=1, num_blocks=5)))


def test_metric_names_are_found_in_expressions() -> None:
    assert metric_names(
        'sum by (le, b) (rate(x:a_bucket{m=~"$m, c"}[$__rate_interval])) / ignoring (p) d + 0.5'
    ) == {
        "x:a_bucket",
        "d",
    }


def test_every_metric_of_the_dashboard_exists() -> None:
    asked = set().union(*map(metric_names, EXPRESSIONS))
    assert len(asked) > 40
    assert asked - rendered_names() == set()


def test_expressions_are_balanced_and_ask_for_the_chosen_models() -> None:
    for expression in EXPRESSIONS:
        for opening, closing in ("()", "[]", "{}"):
            assert expression.count(opening) == expression.count(closing), expression
        for name in re.findall(r"jaxpaged:\w+", expression):
            assert f'{name}{{model_name=~"$model_name"' in expression, name
        if "histogram_quantile" in expression:
            assert re.search(r"sum by \(le\b", expression), expression


def test_panels_do_not_overlap_and_fit_the_grid() -> None:
    cells: dict[tuple[int, int], str] = {}
    for panel in PANELS:
        place = panel["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        assert 0 <= columns.start < columns.stop <= 24, panel["title"]
        for cell in itertools.product(columns, range(place["y"], place["y"] + place["h"])):
            assert cell not in cells, f"{panel['title']} lies over {cells[cell]}"
            cells[cell] = panel["title"]
    height = 1 + max(y for _, y in cells)
    assert len(cells) == 24 * height, "there are gaps"


def test_panels_can_be_told_apart_and_come_in_rows() -> None:
    ids = [panel["id"] for panel in PANELS]
    assert len(ids) == len(set(ids))
    rows = [panel["title"] for panel in PANELS if panel["type"] == "row"]
    assert rows == [
        *("Traffic and latency", "Throughput", "KV pool", "Scheduler", "Host and device memory", "HTTP"),
    ]
    for panel in PANELS:
        if panel["type"] != "row":
            assert panel["description"].endswith("."), panel["title"]
            references = [target["refId"] for target in panel["targets"]]
            assert references
            assert len(references) == len(set(references)), panel["title"]


def test_data_source_and_model_are_chosen_by_the_user() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    assert variables["model_name"]["query"]["query"] == "label_values(jaxpaged:engine_state, model_name)"
    for holder in [*PANELS, *(target for panel in PANELS for target in panel.get("targets", ()))]:
        if holder.get("type") != "row":
            assert holder["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert DASHBOARD["schemaVersion"] >= 41
    assert DASHBOARD["id"] is None, "an id belongs to one installation"
