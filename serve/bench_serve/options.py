"""The options of ``jaxpaged bench serve``, and what the texts among them mean."""

import dataclasses
import json
import math
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

SERVER, WORKLOAD, ARRIVALS, REQUESTS, RESULTS = "Server", "Workload", "Arrivals", "Requests", "Results"
METRICS = ("ttft", "tpot", "itl", "e2el")
OBJECTIVES = ("ttft", "tpot", "e2el")  # those that a request has one value of
RANDOM = "random"
NUM_RANDOM_PROMPTS = 1000


class Endpoint(StrEnum):
    """What ``--endpoint`` takes."""

    COMPLETIONS = "completions"
    CHAT = "chat"


def _server(*names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=SERVER, **more)


def _workload(*names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=WORKLOAD, **more)


def _arrivals(*names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=ARRIVALS, **more)


def _requests(*names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=REQUESTS, **more)


def _results(*names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=RESULTS, **more)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchServeOptions:
    """Where to send what, when, and what to do with the figures; names and defaults are those of vLLM's."""

    workload: Annotated[
        str,
        typer.Argument(
            metavar="WORKLOAD",
            help='"random", a workload file, or JSON or JSONL of {"prompt": text or token ids, "out": tokens}, '
            "out being optional.",
        ),
    ] = RANDOM
    base_url: Annotated[str, _server(help="With or without /v1 at the end.")] = "http://127.0.0.1:8000"
    endpoint: Annotated[Endpoint, _server(help="/v1/completions or /v1/chat/completions.")] = (
        Endpoint.COMPLETIONS
    )
    model: Annotated[
        str | None, _server("--model", "-m", help="[dim]Default: the first of /v1/models.[/]")
    ] = None
    api_key: Annotated[str | None, _server(help="Sent as bearer token; in no output.")] = None
    timeout: Annotated[float, _server(help="Seconds that one request may take.", min=0.001)] = 600.0
    ready_timeout: Annotated[
        float, _server(help="Seconds to wait for a server that does not answer yet.", min=0)
    ] = 0.0

    name: Annotated[str | None, _workload("--workload", "-w", help="Name of the list in the file.")] = None
    num_prompts: Annotated[
        int | None,
        _workload(
            help=f"Requests to send. [dim]Default: {NUM_RANDOM_PROMPTS} at random, else all of the file.[/]",
            min=1,
        ),
    ] = None
    output_len: Annotated[
        int | None, _workload(help="Tokens of each answer, whatever the file says.", min=1)
    ] = None
    random_input_len: Annotated[int, _workload(help="Tokens of a random prompt.", min=1)] = 1024
    random_output_len: Annotated[int, _workload(help="Tokens of the answer to it.", min=1)] = 128
    random_range_ratio: Annotated[
        float, _workload(help="Both lengths are uniform in (1 - R) to (1 + R) times these; R below 1.", min=0)
    ] = 0.0
    random_prefix_len: Annotated[
        int, _workload(help="Tokens in front of every random prompt, the same for all.", min=0)
    ] = 0
    random_vocab_size: Annotated[
        int, _workload(help="Random token ids are below this; texts of --endpoint chat are words.", min=16)
    ] = 256
    seed: Annotated[int, _workload(help="Of prompts, lengths and arrivals.", min=0)] = 0

    request_rate: Annotated[float, _arrivals(help="Requests a second; inf is all at once.")] = math.inf
    burstiness: Annotated[
        float, _arrivals(help="Shape of the gamma distributed gaps: 1 is Poisson, less is burstier.")
    ] = 1.0
    ramp: Annotated[
        str | None,
        _arrivals(metavar="FROM:TO", help="A rate that goes from one to the other, for --request-rate."),
    ] = None
    max_concurrency: Annotated[
        int | None, _arrivals(help="Requests in flight at most; others wait in the client.", min=1)
    ] = None
    num_warmups: Annotated[int, _arrivals(help="Requests before the clock starts.", min=0)] = 0

    temperature: Annotated[float, _requests("--temperature", "-t", help="0 is greedy.", min=0)] = 0.0
    ignore_eos: Annotated[
        bool | None,
        _requests(
            help="Go on after the end of the text. [dim]Default: where the output length is given.[/]",
            show_default=False,
        ),
    ] = None
    extra_body: Annotated[
        str | None, _requests(metavar="JSON", help="Fields of every request; null leaves one out.")
    ] = None

    goodput: Annotated[
        str | None,
        _results(
            metavar='"ttft:MS ..."', help="Objectives of a good request, of ttft, tpot and e2el, in ms."
        ),
    ] = None
    percentile_metrics: Annotated[str, _results(help="Rows of times to show.")] = ",".join(METRICS)
    metric_percentiles: Annotated[str, _results(help="Columns of them.")] = "50,90,95,99"
    json: Annotated[Path | None, _results("--json", help="File for all figures.")] = None
    plot: Annotated[Path | None, _results("--plot", help="File for a picture of them: .png, .svg, .pdf.")] = (
        None
    )
    save_detailed: Annotated[
        bool, _results("--save-detailed", help="Times and text of every request in the JSON file.")
    ] = False

    def check(self) -> None:
        """Raises ValueError that names the option and its value, before anything is sent."""
        if not self.request_rate > 0:
            raise ValueError(f"--request-rate={self.request_rate}: must be positive")
        if not 0 < self.burstiness < math.inf:
            raise ValueError(f"--burstiness={self.burstiness}: must be positive")
        if not self.random_range_ratio < 1:
            raise ValueError(f"--random-range-ratio={self.random_range_ratio}: must be below 1")
        if self.ramp is not None and self.request_rate != math.inf:
            raise ValueError(f"--ramp={self.ramp}: does not go with --request-rate={self.request_rate}")
        if self.name is not None and self.workload == RANDOM:
            raise ValueError(f"--workload={self.name}: there is no file to look in")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("--api-key: must be printable ASCII")
        if self.save_detailed and self.json is None:
            raise ValueError("--save-detailed: needs --json FILE")
        for option, path in (("--json", self.json), ("--plot", self.plot)):
            if path is not None and not path.parent.is_dir():
                raise ValueError(f"{option}={path}: there is no folder {path.parent}")
        if self.plot is not None and find_spec("matplotlib") is None:
            raise ValueError(f"--plot={self.plot}: needs matplotlib: pip install matplotlib")
        _ = self.rates, self.fields, self.objectives, self.metrics, self.percentiles

    @property
    def rates(self) -> tuple[float, float]:
        """Requests a second at the first and at the last request."""
        if self.ramp is None:
            return self.request_rate, self.request_rate
        try:
            first, last = (float(text) for text in self.ramp.split(":"))
        except ValueError:
            first = last = 0.0
        if not (0 < first < math.inf and 0 < last < math.inf):
            raise ValueError(f"--ramp={self.ramp!r}: must be two rates, as in 1:20")
        return first, last

    @property
    def fields(self) -> dict[str, Any]:
        """What ``--extra-body`` holds."""
        try:
            fields = json.loads(self.extra_body or "{}")
        except ValueError as error:
            raise ValueError(f"--extra-body={self.extra_body!r}: is not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"--extra-body={self.extra_body!r}: must be a JSON object")
        return fields

    @property
    def objectives(self) -> dict[str, float]:
        """Seconds by metric, of ``--goodput``."""
        objectives: dict[str, float] = {}
        for entry in (self.goodput or "").replace(",", " ").split():
            metric, _, text = entry.partition(":")
            if metric not in OBJECTIVES:
                raise ValueError(
                    f"--goodput: {entry!r}: must be one of {', '.join(OBJECTIVES)}, as in ttft:200"
                )
            if metric in objectives:
                raise ValueError(f"--goodput: {entry!r}: {metric} is given twice")
            objectives[metric] = _milliseconds(entry, text) / 1e3
        if self.goodput is not None and not objectives:
            raise ValueError(f"--goodput={self.goodput!r}: names no objective, as in ttft:200")
        return objectives

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics to show, without repetition."""
        names = tuple(dict.fromkeys(self.percentile_metrics.replace(",", " ").split()))
        for name in names:
            if name not in METRICS:
                raise ValueError(f"--percentile-metrics: {name!r}: must be one of {', '.join(METRICS)}")
        return names

    @property
    def percentiles(self) -> tuple[float, ...]:
        """The percentiles to take, each in 0 to 100."""
        texts = self.metric_percentiles.replace(",", " ").split()
        try:
            marks = tuple(dict.fromkeys(float(text) for text in texts))
        except ValueError:
            marks = ()
        if not marks or not all(0 <= mark <= 100 for mark in marks):
            raise ValueError(f"--metric-percentiles={self.metric_percentiles!r}: must be as in 50,90,99.9")
        return marks

    def record(self) -> dict[str, Any]:
        """The options as JSON's own types; the API key is left out."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["api_key"] = None if self.api_key is None else "given"
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
        return plain | {"request_rate": "inf" if math.isinf(self.request_rate) else self.request_rate}


def _milliseconds(entry: str, text: str) -> float:
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise ValueError(f"--goodput: {entry!r}: must have positive milliseconds, as in ttft:200")
    return limit
