"""Workload files, the arithmetic of the figures, and ``jaxpaged bench``."""

import json
import math
from pathlib import Path

import pytest

from jaxpaged.serve.bench import median_run
from jaxpaged.serve.measure import RequestTimes, distribution
from jaxpaged.serve.workload import WorkItem, read_workload
from tests.serve.command_line import run_small

WORKLOAD = [
    {"prompt": [5, 6, 7, 8] * 5, "out": 6},
    {"prompt": "the cat", "out": 1},
    {"prompt": [9], "out": 9},
]


def write(folder: Path, value: object) -> Path:
    path = folder / "workload.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_a_list_and_one_of_several_lists(tmp_path: Path) -> None:
    assert read_workload(write(tmp_path, WORKLOAD))[1] == WorkItem("the cat", 1)
    named = write(tmp_path, {"W1": WORKLOAD[:1], "W2": WORKLOAD[1:]})
    assert [item.out for item in read_workload(named, "W2")] == [1, 9]
    assert len(read_workload(write(tmp_path, {"only": WORKLOAD}))) == 3


@pytest.mark.parametrize(
    ("content", "name", "named"),
    [
        ("[", None, "not JSON"),
        ("[]", None, "not empty"),
        ("3", None, "must hold a list"),
        ([{"prompt": "x"}], None, "request 0"),
        ([*WORKLOAD, {"prompt": "x", "out": 0}], None, "request 3: out=0"),
        ([{"prompt": "", "out": 1}], None, "prompt=''"),
        ([{"prompt": "x", "out": 1, "n": 2}], None, "request 0"),
        (WORKLOAD, "W1", "without a name"),
        ({"W1": WORKLOAD, "W2": WORKLOAD}, None, "--workload"),
        ({"W1": WORKLOAD}, "W9", "--workload=W9"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, content: object, name: str | None, named: str) -> None:
    with pytest.raises(ValueError, match="workload") as caught:
        read_workload(write(tmp_path, content), name)
    assert named in str(caught.value)


def test_times_of_a_request() -> None:
    times = RequestTimes(sent=10.0, num_tokens=5, arrivals=[10.5, 11.0, 12.5])
    assert (times.ttft, times.latency, times.tpot) == (0.5, 2.5, 0.5)
    assert times.gaps == [0.5, 1.5]
    assert RequestTimes(sent=0.0, num_tokens=1, arrivals=[1.0]).tpot is None


def test_distributions_and_the_run_in_the_middle() -> None:
    assert distribution([]) is None
    assert distribution([1.0, 3.0]) == pytest.approx({"mean": 2.0, "p50": 2.0, "p90": 2.8, "p99": 2.98})
    runs = [{"output_tokens_per_second": rate} for rate in (3.0, 1.0, 2.0, 9.0)]
    assert median_run(runs) == {"output_tokens_per_second": 2.0}


@pytest.mark.parametrize("mode", ["throughput", "latency"])
def test_the_table_and_the_record(checkpoint: Path, tmp_path: Path, mode: str) -> None:
    target = tmp_path / "figures.json"
    arguments = (write(tmp_path, WORKLOAD), "--repeats", "2", "--json", target)
    shown = run_small(f"bench {mode}", checkpoint, *arguments).stdout
    for label in ("output tokens/s", "time to first token", "inter-token latency", "padding waste"):
        assert label in shown
    assert max(map(len, shown.splitlines())) <= 80
    record = json.loads(target.read_text())
    assert record["commit"] is None or len(record["commit"]) >= 40
    assert {"jax", "python", "jaxpaged"} <= set(record["versions"])
    assert record["engine"]["block_size"] == 8
    assert len(record["runs"]) == 2
    for run in record["runs"]:
        assert (run["requests"], run["output_tokens"], run["compiles"]) == (3, 16, 0)
        assert run["prefix_hit_rate"] == 0
        assert 0 < run["peak_kv_usage"] <= 1
        assert 0 <= run["padding_waste"] < 1
        assert math.isclose(run["output_tokens_per_second"], 16 / run["seconds"])
    # One by one each request takes its own steps; together they share them.
    assert record["median"]["steps"] == (16 if mode == "latency" else 9)
