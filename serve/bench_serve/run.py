"""``jaxpaged bench serve``: from options to a table, a JSON file and a picture."""

import asyncio
import json
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import typer

from jaxpaged.serve import environment
from jaxpaged.serve.bench_serve.address import Address
from jaxpaged.serve.bench_serve.arrivals import arrival_times
from jaxpaged.serve.bench_serve.client import allow_connections
from jaxpaged.serve.bench_serve.dataset import Dataset, make_dataset
from jaxpaged.serve.bench_serve.figures import Outcome, client_figures, errors, figures
from jaxpaged.serve.bench_serve.load import LoadRun, new_event_loop
from jaxpaged.serve.bench_serve.options import BenchServeOptions
from jaxpaged.serve.bench_serve.report import notes, renderables
from jaxpaged.serve.bench_serve.session import PATHS, Measured, measure
from jaxpaged.serve.commands import EXIT_FAILED, EXIT_INTERRUPTED
from jaxpaged.serve.terminal import stderr, stdout

CLIENT_PACKAGES = ("httptools", "uvloop")


def run_bench_serve(options: BenchServeOptions) -> None:
    """Sends the workload and shows the figures; what was measured until Ctrl-C too.

    Raises:
      ValueError: an option does not hold, or no server is ready at ``--base-url``; nothing was measured.
      typer.Exit: with status 1 if no request was answered, with 130 after Ctrl-C.
    """
    options.check()
    address = Address.parse(options.base_url, options.api_key)
    for_items, for_arrivals = map(np.random.default_rng, np.random.SeedSequence(options.seed).spawn(2))
    dataset = make_dataset(options, for_items)
    schedule = arrival_times(len(dataset.items), options.rates, options.burstiness, for_arrivals)
    allow_connections(min(len(dataset.items), options.max_concurrency or len(dataset.items)))
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        measured = runner.run(measure(options, address, dataset, schedule))
    if measured.run is None:
        _leave(measured.warmups.outcomes(), is_interrupted=False, what="warm-up request")
        raise typer.Exit(EXIT_INTERRUPTED)
    outcomes = measured.collector.outcomes()
    record = make_record(options, dataset, measured, measured.run, outcomes)
    for part in renderables(record, options.metrics, options.percentiles):
        stdout().print(part)
    _write_files(options, record, outcomes, measured.run)
    _leave(outcomes, is_interrupted=measured.run.num_unfinished > 0, what="request")


def make_record(
    options: BenchServeOptions,
    dataset: Dataset,
    measured: Measured,
    run: LoadRun,
    outcomes: Sequence[Outcome],
) -> dict[str, Any]:
    """All figures with everything they have to be read with, as JSON's own types."""
    record: dict[str, Any] = {
        "mode": "serve",
        "command": _command(options.api_key),
        **_client_environment(),
        "server": {
            "base_url": options.base_url,
            "path": PATHS[options.endpoint],
            "model": measured.server.model,
            "software": measured.server.software,
        },
        "workload": dataset.describe(),
        "options": options.record(),
        "result": figures(outcomes, run, options.percentiles, options.objectives),
        "client": client_figures(run, measured.collector.num_chunks),
        "errors": errors(outcomes),
    }
    record["client"]["read_early"] = measured.collector.num_read_early
    record["notes"] = notes(record)
    if options.save_detailed:
        record["requests"] = [details(one, run.started) for one in outcomes]
    return record


def details(one: Outcome, started: float) -> dict[str, Any]:
    """One request as JSON's own types; ``sent`` is in seconds after the start of the run."""
    is_good = one.failure is None
    return {
        "at": one.at,
        "sent": one.sent - started,
        "wait": one.wait,
        "prompt_len": one.prompt_len,
        "output_len": one.output_len,
        "ttft": one.ttft if is_good else None,
        "tpot": one.tpot if is_good else None,
        "itl": one.itl,
        "e2el": one.e2el,
        "finish_reason": one.finish_reason,
        "text": one.text,
        "error": None if one.failure is None else f"{one.failure.kind}: {one.failure.message}",
    }


def _client_environment() -> dict[str, Any]:
    """The machine of the client. JAX is left alone: it would take the accelerator away from a server beside it."""
    versions = environment.versions()
    for name in CLIENT_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    hardware = environment.host()
    return {"hardware": hardware, "versions": versions, "commit": environment.commit()}


def _command(api_key: str | None) -> str:
    """The command line, without the key in it."""
    words = ["jaxpaged", *sys.argv[1:]]
    return shlex.join(word if not api_key else word.replace(api_key, "***") for word in words)


def _write_files(
    options: BenchServeOptions, record: dict[str, Any], outcomes: Sequence[Outcome], run: LoadRun
) -> None:
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        _say_written(options.json)
    if options.plot is not None:
        from jaxpaged.serve.bench_serve.plot import save_plot

        title = f"{record['workload']['name']}: {record['server']['model']} at {options.base_url}"
        save_plot(options.plot, outcomes, run.started, title, options.objectives)
        _say_written(options.plot)


def _say_written(path: Path) -> None:
    stderr().print(f"written to {path}", style="dim", markup=False)


def _leave(outcomes: Sequence[Outcome], *, is_interrupted: bool, what: str) -> None:
    """Ends the command where it did not get what it was for."""
    failed = [one for one in outcomes if one.failure is not None]
    if failed and len(failed) == len(outcomes):
        first = min(failed, key=lambda one: one.ended).failure
        assert first is not None
        console = stderr()
        console.print("[bold red]error:[/] ", end="")
        text = f"every {what} failed; the first: {first.kind}: {first.message}"
        console.print(text, markup=False, soft_wrap=True)
        raise typer.Exit(EXIT_FAILED)
    if is_interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)
