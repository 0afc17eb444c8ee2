"""One measurement from the first question to the server to its last answer."""

import asyncio
import json
import math
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxpaged.serve.bench_serve.address import Address
from jaxpaged.serve.bench_serve.answer import message_of
from jaxpaged.serve.bench_serve.client import Client, reason
from jaxpaged.serve.bench_serve.collector import Collector
from jaxpaged.serve.bench_serve.dataset import DEFAULT_OUTPUT_LEN, BenchItem, Dataset
from jaxpaged.serve.bench_serve.load import LoadRun, run_load
from jaxpaged.serve.bench_serve.options import BenchServeOptions, Endpoint
from jaxpaged.serve.terminal import stderr

PATHS = {Endpoint.COMPLETIONS: "completions", Endpoint.CHAT: "chat/completions"}
PROBE_TIMEOUT = 30.0  # seconds for what should be answered at once
PROBE_PAUSE = 0.5  # seconds between questions whether the server is ready


@dataclass(frozen=True)
class Server:
    """What a server said of itself."""

    model: str
    software: str  # its Server header


@dataclass(frozen=True)
class Measured:
    """A measurement; ``run`` is None when it was interrupted before it began."""

    server: Server
    run: LoadRun | None
    collector: Collector
    warmups: Collector


async def measure(
    options: BenchServeOptions, address: Address, dataset: Dataset, schedule: Sequence[float]
) -> Measured:
    """Waits for the server, warms it up, and sends the requests at their times.

    Raises:
      ValueError: no server is there, or it is not ready, or its model is not known.
    """
    try:
        client = Client(address, await address.resolve(), timeout=options.timeout)
    except OSError as error:
        raise ValueError(f"--base-url={address.url}: {reason(error)}") from None
    try:
        server = await find_server(client, address, options)
        run_id = secrets.token_hex(4)
        path = f"/v1/{PATHS[options.endpoint]}"

        def messages(items: Sequence[BenchItem], kind: str) -> list[bytes]:
            return [
                address.post(path, request_body(item, server.model, options), f"{kind}-{run_id}-{at}")
                for at, item in enumerate(items)
            ]

        sent = messages(dataset.items, "bench")
        warmups = Collector([None] * len(dataset.warmups))
        if dataset.warmups:
            warmed = await run_load(
                client,
                messages(dataset.warmups, "warmup"),
                [0.0] * len(dataset.warmups),
                warmups.take,
                max_concurrency=options.max_concurrency,
            )
            if warmed.num_unfinished or all(one.failure for one in warmups.outcomes()):
                return Measured(server, None, Collector([]), warmups)
        known = [len(item.prompt) if isinstance(item.prompt, list) else None for item in dataset.items]
        collector = Collector(known)
        with ProgressLine(collector, len(sent)) as progress:
            run = await run_load(
                client,
                sent,
                schedule,
                collector.take,
                max_concurrency=options.max_concurrency,
                tick=progress.tick if progress.is_shown else None,
            )
        return Measured(server, run, collector, warmups)
    finally:
        client.close()


async def find_server(client: Client, address: Address, options: BenchServeOptions) -> Server:
    """Asks until the server is ready, for ``ready_timeout`` seconds, and then for its model.

    Not ready is one that takes no connection, or whose ``/health`` says 503.
    """
    where = f"--base-url={address.url}"
    deadline = time.monotonic() + options.ready_timeout
    while True:
        health, failure = await client.send(address.get("/health"), PROBE_TIMEOUT)
        if failure is None and health.status != 503:
            break
        if time.monotonic() >= deadline:
            if failure is not None:
                raise ValueError(f"{where}: {failure.message}: is a server running there?")
            raise ValueError(
                f"{where}: the server is not ready: {message_of(health.body)} (--ready-timeout waits)"
            )
        await asyncio.sleep(PROBE_PAUSE)
    if options.model is not None:
        return Server(options.model, health.server)
    models, failure = await client.send(address.get("/v1/models"), PROBE_TIMEOUT)
    if failure is not None:
        raise ValueError(f"{where}: {failure.message} at /v1/models")
    if models.status != 200:
        raise ValueError(
            f"{where}: /v1/models says {models.status}: {message_of(models.body)}: name a model with --model"
        )
    try:
        model = json.loads(models.body)["data"][0]["id"]
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{where}: /v1/models names no model: name one with --model") from None
    return Server(str(model), models.server)


def request_body(item: BenchItem, model: str, options: BenchServeOptions) -> bytes:
    """The JSON of one request; the fields of ``--extra-body`` replace those of the same name."""
    fields: dict[str, Any] = {"model": model}
    if options.endpoint == Endpoint.CHAT:
        fields["messages"] = [{"role": "user", "content": item.prompt}]
    else:
        fields["prompt"] = item.prompt
    fields |= {
        "max_tokens": item.out or DEFAULT_OUTPUT_LEN,
        "temperature": options.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    is_fixed = item.out is not None
    if is_fixed if options.ignore_eos is None else options.ignore_eos:
        fields["ignore_eos"] = True
    extra = options.fields
    fields = {
        name: value for name, value in (fields | extra).items() if name not in extra or value is not None
    }
    return json.dumps(fields).encode()


class ProgressLine:
    """One line on a terminal that says how far a run is; rewritten by hand, as a live display would take CPU time."""

    def __init__(self, collector: Collector, num_requests: int) -> None:
        self.is_shown = stderr().is_terminal
        self._collector = collector
        self._num_requests = num_requests
        self._started = math.nan

    def __enter__(self) -> "ProgressLine":
        self._started = time.monotonic()
        return self

    def tick(self) -> None:
        """Writes the line anew."""
        ended, failed = self._collector.num_ended, self._collector.num_failed
        took = time.monotonic() - self._started
        failures = f", {failed:,} failed" if failed else ""
        self._write(f"{ended:,} of {self._num_requests:,} requests{failures}, {took:.0f} s")

    def __exit__(self, *_: object) -> None:
        if self.is_shown:
            self._write("")

    def _write(self, text: str) -> None:
        sys.stderr.write(f"\r\x1b[2K{text}")
        sys.stderr.flush()
