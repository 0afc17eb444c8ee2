"""What the peer adapters share: arguments, pinning, timing and the one JSON line they print.

Each adapter is run by the interpreter of its peer's own virtual environment, so this module needs only the
standard library and runs on Python 3.11 too. Import it before the peer: pinning and thread counts must be set
by then.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Protocol

_PROCESS_START = time.perf_counter()
_REAL_STDOUT = os.dup(1)
os.dup2(2, 1)  # libraries that print to stdout must not disturb the JSON line

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclasses.dataclass(frozen=True)
class Request:
    """One request: the token ids of its prompt and the exact number of tokens to generate."""

    prompt: list[int]
    out: int


@dataclasses.dataclass
class Served:
    """One answered request: its tokens, and when the first and the last came, in seconds since submission."""

    tokens: list[int]
    first: float | None = None
    last: float | None = None


class Adapter(Protocol):
    """What an adapter module provides: a peer that is ready to serve."""

    version: str

    def serve(self, requests: list[Request]) -> tuple[float, list[Served]]:
        """Serve the requests, all submitted at once; return the seconds taken and the answers in order."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line of every adapter."""

    checkpoint: Path
    workload: str
    dtype: str
    repeats: int
    cores: list[int]
    workloads: dict[str, list[Request]]
    tokens_json: Path | None

    @property
    def requests(self) -> list[Request]:
        """The requests that are timed."""
        return self.workloads[self.workload]

    @property
    def context(self) -> int:
        """The longest sequence of the workload and of the warm-up, in tokens."""
        return max(len(r.prompt) + r.out for r in self.requests + self.workloads["warm"])


def parse_arguments(description: str | None) -> Arguments:
    """Read the command line, pin the process to its cores and tell the thread pools how many there are."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--checkpoint", type=Path, required=True, help="Hugging Face checkpoint folder")
    parser.add_argument("--workload", choices=("W1", "W2", "W3"), required=True)
    parser.add_argument("--workloads-json", type=Path, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", help="comma separated cores to pin to; the inherited ones if not given")
    parser.add_argument("--tokens-json", type=Path, help="also write the tokens generated in the last repeat")
    args = parser.parse_args()
    if args.cores:
        os.sched_setaffinity(0, [int(core) for core in args.cores.split(",")])
    cores = sorted(os.sched_getaffinity(0))
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(len(cores))
    data = json.loads(args.workloads_json.read_text())
    workloads = {name: [Request(**request) for request in requests] for name, requests in data.items()}
    return Arguments(
        args.checkpoint, args.workload, args.dtype, args.repeats, cores, workloads, args.tokens_json
    )


def _mean_ms(values: list[float]) -> float | None:
    """Return the mean in milliseconds, or None where nothing was measured."""
    return round(1e3 * statistics.fmean(values), 3) if values else None


def measure(peer: str, adapter: Adapter, args: Arguments) -> None:
    """Warm up, run the workload ``repeats`` times and print the JSON line."""
    startup = time.perf_counter() - _PROCESS_START
    adapter.serve(args.workloads["warm"])
    seconds, first, per_token, served = [], [], [], []
    for _ in range(args.repeats):
        elapsed, served = adapter.serve(args.requests)
        seconds.append(elapsed)
        for request, answer in zip(args.requests, served, strict=True):
            if len(answer.tokens) != request.out:
                raise RuntimeError(
                    f"{peer} gave {len(answer.tokens)} tokens where {request.out} were asked for"
                )
            if answer.first is not None:
                first.append(answer.first)
            if answer.first is not None and answer.last is not None and request.out > 1:
                per_token.append((answer.last - answer.first) / (request.out - 1))
    if args.tokens_json:
        args.tokens_json.write_text(json.dumps([answer.tokens for answer in served]))
    output_tokens = sum(request.out for request in args.requests)
    report = {
        "peer": peer,
        "version": adapter.version,
        "workload": args.workload,
        "dtype": args.dtype,
        "cores": args.cores,
        "output_tokens": output_tokens,
        "output_tokens_per_second": round(output_tokens / statistics.median(seconds), 2),
        "ttft_ms_mean": _mean_ms(first),
        "tpot_ms_mean": _mean_ms(per_token),
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "startup_s": round(startup, 2),
        "seconds": [round(value, 4) for value in seconds],
    }
    if details := getattr(adapter, "details", None):
        report["details"] = details()
    with os.fdopen(os.dup(_REAL_STDOUT), "w") as stdout:
        stdout.write(json.dumps(report) + "\n")
    sys.stderr.flush()
