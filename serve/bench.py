"""``jaxpaged bench``: a workload, run once to compile and then measured; one table, one JSON file."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from jaxpaged.serve.environment import environment
from jaxpaged.serve.info import attention_implementation
from jaxpaged.serve.measure import MODES, figures
from jaxpaged.serve.options import EngineOptions
from jaxpaged.serve.terminal import counted, percent, seconds, stderr, stdout, waiting
from jaxpaged.serve.workload import read_workload

COLUMNS = ("mean", "p50", "p90", "p99")


def run_bench(
    mode: str, path: Path, name: str | None, repeats: int, target: Path | None, options: EngineOptions
) -> None:
    """Measures ``repeats`` runs and shows the one of median speed; all of them go into the JSON file."""
    items = read_workload(path, name)
    if target is not None and not target.parent.is_dir():
        raise ValueError(f"--json={target}: there is no folder {target.parent}")
    with waiting("loading the model"):
        engine = options.open()
    with engine:
        run = MODES[mode]
        with waiting("run without measuring, to compile what the workload needs"):
            run(engine, items)
        results = []
        for at in range(repeats):
            with waiting(f"run {at + 1} of {repeats}"):
                results.append(figures(run(engine, items)))
        record = {
            "mode": mode,
            "workload": {"file": path.name, "name": name, "requests": len(items)},
            "command": shlex.join(["jaxpaged", *sys.argv[1:]]),
            **environment(),
            "model": "embedded" if options.is_embedded else str(options.model),
            "engine": dataclasses.asdict(engine.config),
            "attention": attention_implementation(engine),
            "median": median_run(results),
            "runs": results,
        }
    stdout().print(table(record))
    if target is not None:
        target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        stderr().print(f"written to {target}", style="dim", markup=False)


def median_run(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The run in the middle when they are ordered by speed, the slower one of two."""
    ordered = sorted(results, key=lambda result: float(result["output_tokens_per_second"]))
    return ordered[(len(ordered) - 1) // 2]


def table(record: dict[str, Any]) -> Table:
    """The table of a benchmark record."""
    result, runs = record["median"], record["runs"]
    hardware, engine = record["hardware"], record["engine"]
    name = record["workload"]["name"] or record["workload"]["file"]
    title = f"{record['mode']}: {name}, {counted(result['requests'], 'request')}, {engine['dtype']}"
    where = hardware["cpu"] if hardware["platform"] == "cpu" else hardware["devices"][0]
    caption = f"{where}, {counted(hardware['cores'], 'core')}, attention {record['attention']}"
    shown = Table(
        title=title, caption=caption, title_justify="left", caption_justify="left", title_style="bold"
    )
    shown.add_column("", style="cyan", no_wrap=True)
    for column in COLUMNS:
        shown.add_column(column, justify="right", no_wrap=True)
    for label, key in (
        ("time to first token", "ttft"),
        ("time per output token", "tpot"),
        ("inter-token latency", "itl"),
        ("whole request", "latency"),
    ):
        marks = result[key] or dict.fromkeys(COLUMNS)
        shown.add_row(label, *(seconds(marks[column]) for column in COLUMNS))
    shown.add_section()
    for label, value, note in _scalars(result, runs):
        shown.add_row(label, value, *note)
    return shown


def _scalars(result: dict[str, Any], runs: list[dict[str, Any]]) -> list[tuple[str, str, list[str]]]:
    """Rows of one number each; the slowest and fastest run beside the rate."""
    rates = sorted(run["output_tokens_per_second"] for run in runs)
    spread = [f"min {rates[0]:,.1f}", f"max {rates[-1]:,.1f}", f"of {len(runs)}"] if len(runs) > 1 else []
    rows: list[tuple[str, str, list[str]]] = [
        ("output tokens/s", f"{result['output_tokens_per_second']:,.1f}", spread),
        ("all tokens/s", f"{result['total_tokens_per_second']:,.1f}", []),
        ("requests/s", f"{result['requests_per_second']:,.2f}", []),
        ("prompt tokens", f"{result['prompt_tokens']:,}", []),
        ("output tokens", f"{result['output_tokens']:,}", []),
        ("steps", f"{result['steps']:,}", []),
        ("tokens per step", f"{result['tokens_per_step']:,.1f}", []),
        ("padding waste", percent(result["padding_waste"]), []),
        ("device time per step", seconds(result["device_time_per_step"]), []),
        ("host time per step", seconds(result["host_time_per_step"]), []),
        ("KV pool at peak", percent(result["peak_kv_usage"]), []),
        ("prefix cache hits", percent(result["prefix_hit_rate"]), []),
        ("preemptions", str(result["preemptions"]), []),
        ("compiles while measured", str(result["compiles"]), []),
    ]
    return rows
