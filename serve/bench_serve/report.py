"""The table of a run, its errors, and what one should know when reading its figures."""

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from jaxpaged.serve.bench_serve.figures import percentile_name
from jaxpaged.serve.terminal import counted, harmless, percent, seconds

LABELS = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2el": "whole request",
}
# A client this busy can delay what it measures.
BUSY_SHARE = 0.7
# Requests sent this much later than planned make another workload of it.
LATE_SECONDS = 0.01


def table(record: dict[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> Table:
    """The table of a record."""
    result, options, server = record["result"], record["options"], record["server"]
    ended = result["completed"] + result["failed"]
    title = f"serve: {record['workload']['name']}, {counted(ended, 'request')}, {_rate_text(options)}"
    shown = Table(
        title=Text(title, style="bold"),
        caption=Text(f"{server['model']} at {server['base_url']}, /v1/{server['path']}"),
        title_justify="left",
        caption_justify="left",
    )
    shown.add_column("", style="cyan", no_wrap=True)
    columns = ("mean", *map(percentile_name, percentiles))
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    for metric in metrics:
        marks = result[metric] or dict.fromkeys(columns)
        shown.add_row(LABELS[metric], *(seconds(marks[column]) for column in columns))
    shown.add_section()
    for label, value in _scalars(result, record["client"]):
        shown.add_row(label, value)
    return shown


def _rate_text(options: dict[str, Any]) -> str:
    at_most = options["max_concurrency"]
    limit = "" if at_most is None else f", at most {at_most} in flight"
    if options["ramp"] is not None:
        first, _, last = options["ramp"].partition(":")
        return f"{first} to {last} a second{limit}"
    if options["request_rate"] == "inf":
        return f"all at once{limit}"
    return f"{options['request_rate']:g} a second{limit}"


def _scalars(result: dict[str, Any], client: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("output tokens/s", _number(result["output_tokens_per_second"], 1)),
        ("all tokens/s", _number(result["total_tokens_per_second"], 1)),
        ("requests/s", _number(result["requests_per_second"], 2)),
    ]
    if result["goodput"] is not None:
        rows.append(("good requests/s", _number(result["goodput"]["requests_per_second"], 2)))
        rows.append(("good requests", _percent(result["goodput"]["share_of_requests"])))
    rows += [
        ("completed", f"{result['completed']:,}"),
        ("failed", f"{result['failed']:,}"),
        ("unfinished", f"{result['unfinished']:,}"),
        ("prompt tokens", _number(result["prompt_tokens"], 0)),
        ("output tokens", _number(result["output_tokens"], 0)),
        ("tokens per chunk", _number(result["tokens_per_chunk"], 2)),
        ("peak concurrency", f"{result['peak_concurrency']:,}"),
        ("duration", seconds(result["seconds"])),
        ("client's CPU, of a core", _percent(client["cpu_share"])),
        ("client's CPU a chunk", seconds(client["cpu_per_chunk"])),
    ]
    return [row for row in rows if row != ("unfinished", "0")]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else percent(share)


def error_table(errors: Sequence[dict[str, Any]]) -> Table:
    """How many requests failed, how, and what was said first."""
    shown = Table(title="failed requests", title_justify="left", title_style="bold red")
    shown.add_column("kind", style="cyan", no_wrap=True)
    shown.add_column("count", justify="right", no_wrap=True)
    shown.add_column("the first said", overflow="fold")
    for error in errors:
        shown.add_row(error["kind"], f"{error['count']:,}", Text(harmless(error["first"])))
    return shown


def notes(record: dict[str, Any]) -> list[str]:
    """What the figures cannot say by themselves."""
    result, client, workload = record["result"], record["client"], record["workload"]
    found = []
    if result["output_tokens_counted_by"] in ("chunks", "both"):
        found.append("the server sent no usage: an output token is a chunk here, which may hold several")
    if result["completed"] and result["prompt_tokens"] is None:
        found.append("the number of prompt tokens is not known")
    if workload["distinct"] < workload["requests"]:
        found.append(
            f"{workload['requests']} requests of {workload['distinct']} prompts: repeated ones may hit a prefix cache"
        )
    if client["cpu_share"] is not None and client["cpu_share"] > BUSY_SHARE:
        found.append(
            f"the client used {percent(client['cpu_share'])} of a core: it may be what limits these figures"
        )
    wait = result["wait"]
    if wait is not None and wait["max"] > LATE_SECONDS:
        why = "--max-concurrency" if record["options"]["max_concurrency"] is not None else "a busy client"
        found.append(
            f"requests were sent up to {seconds(wait['max'])} later than planned, by {why}, "
            "which their times do not include"
        )
    if client["read_early"]:
        found.append(f"{counted(client['read_early'], 'answer')} had to be read while others ran")
    if result["unfinished"]:
        found.append("interrupted: tokens of unfinished requests are in no figure")
    return found


def renderables(
    record: dict[str, Any], metrics: Sequence[str], percentiles: Sequence[float]
) -> list[RenderableType]:
    """All that is shown of a record, from top to bottom."""
    shown: list[RenderableType] = [table(record, metrics, percentiles)]
    if record["errors"]:
        shown.append(error_table(record["errors"]))
    return shown + [Text(f"note: {note}", style="dim") for note in record["notes"]]
