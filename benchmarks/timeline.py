"""What the device waits for between two steps: one step at a time, and one step ahead.

    python benchmarks/timeline.py --size small --rows 64 --out timeline.json --plot timeline.png

Runs the same decode steps with ``async_scheduling`` off and on, in one process, in turns. A thread notes when the
results of each step are there; a step begins when it was handed over or when the one before ended, whichever is later.
What lies between is time in which the device has nothing to do. Prints medians over the repeats.
"""

import argparse
import dataclasses
import itertools
import json
import queue
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

if __package__:
    from benchmarks.workloads import make_checkpoint
else:
    from workloads import make_checkpoint

from jaxpaged import Engine, RequestOutputKind, SamplingParams
from jaxpaged.serve.environment import environment

STRETCH = 8  # steps that are drawn


@dataclasses.dataclass
class Step:
    """Seconds of ``time.perf_counter``."""

    handed_over: float
    begun: float = 0.0
    ended: float = 0.0


class Watch:
    """Notes when each step of an engine was handed to the device and when its tokens were there."""

    def __init__(self, engine: Engine) -> None:
        self.steps: list[Step] = []
        self._queue: queue.Queue[tuple[Step, Any] | None] = queue.Queue()
        self._runner = engine._live.runner
        self._execute = self._runner.execute
        self._runner.execute = self._noting  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def _noting(self, bucket: int, buffer: np.ndarray) -> Any:
        step = Step(time.perf_counter())
        output = self._execute(bucket, buffer)
        self._queue.put((step, output.sampled.tokens))
        return output

    def _wait(self) -> None:
        ended = 0.0
        while (item := self._queue.get()) is not None:
            step, tokens = item
            jax.block_until_ready(tokens)
            step.begun = max(step.handed_over, ended)
            step.ended = ended = time.perf_counter()
            self.steps.append(step)

    def close(self) -> None:
        """Waits for the last step and puts the runner's method back."""
        self._queue.put(None)
        self._thread.join()
        self._runner.execute = self._execute  # type: ignore[method-assign]


def decode(engine: Engine, rows: int, tokens: int, stream: bool) -> list[Step]:
    """The decode steps of ``rows`` requests, from when all of them run."""
    rng = np.random.default_rng(0)
    params = SamplingParams(
        temperature=0.0, ignore_eos=True, max_tokens=tokens, detokenize=False,
        output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip
    for index in range(rows):
        engine.add_request(str(index), rng.integers(2, 4000, 100).tolist(), params)
    while engine.stats().num_requests_waiting or engine.stats().num_generation_tokens % rows:
        engine.step()
    watch = Watch(engine)
    for _ in range(tokens // 2):
        engine.step()
    watch.close()
    for name in list(engine.block_tables()):
        engine.abort_request(name)
    while engine.has_unfinished_requests:
        engine.step()
    return watch.steps[2:]


def idle_share(steps: list[Step]) -> float:
    """Of the time from the first step to the last, what no step ran in."""
    busy = sum(step.ended - step.begun for step in steps[1:])
    return 1.0 - busy / (steps[-1].ended - steps[0].ended)


def summary(runs: list[list[Step]]) -> dict[str, float]:
    """Medians over the repeats."""
    gaps = [b.begun - a.ended for steps in runs for a, b in itertools.pairwise(steps)]
    periods = [(steps[-1].ended - steps[0].ended) / (len(steps) - 1) for steps in runs]
    return {
        "idle_share": statistics.median(map(idle_share, runs)),
        "gap_us": 1e6 * statistics.median(gaps),
        "step_ms": 1e3 * statistics.median(periods),
    }


def plot(runs: dict[str, list[list[Step]]], path: Path) -> None:
    """Draws a stretch of steps of each kind, one line each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.2), layout="constrained")
    axes = figure.add_subplot()
    for line, repeats in enumerate(runs.values()):
        steps = repeats[-1][:STRETCH]
        origin = steps[0].begun
        for index, step in enumerate(steps):
            span = [(1e3 * (step.begun - origin), 1e3 * (step.ended - step.begun))]
            axes.broken_barh(span, (line - 0.35, 0.7), facecolor=("#0072B2", "#56B4E9")[index % 2])
    axes.set_yticks(range(len(runs)), list(runs))
    axes.set_xlabel("milliseconds; white is a device with nothing to do")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="small", help="of the checkpoint: small or medium")
    parser.add_argument("--folder", type=Path, default=Path(".cache/benchmarks"), help="for checkpoints")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stream", action="store_true", help="outputs at every step")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    checkpoint = make_checkpoint(args.size, args.folder / args.size)
    limits = {"max_num_seqs": args.rows, "max_model_len": 512, "num_scheduler_steps": 1}
    runs: dict[str, list[list[Step]]] = {"one at a time": [], "one step ahead": []}
    with (
        Engine(
            checkpoint, async_scheduling=False, compilation_cache_dir=args.folder / "compiled", **limits
        ) as one,
        Engine(checkpoint, async_scheduling=True, **limits) as ahead,
    ):
        for engine in (one, ahead):
            decode(engine, args.rows, 16, args.stream)  # compiles
        for _ in range(args.repeats):
            for name, engine in zip(runs, (one, ahead), strict=True):
                runs[name].append(decode(engine, args.rows, args.tokens, args.stream))
    found = {name: summary(repeats) for name, repeats in runs.items()}
    for name, figures in found.items():
        print(
            f"{args.rows} rows, {name}: device idle {100 * figures['idle_share']:.2f} %, "
            f"gap {figures['gap_us']:.0f} us, step {figures['step_ms']:.2f} ms"
        )
    if args.plot:
        plot(runs, args.plot)
    if args.out:
        record = {"command": vars(args) | {"folder": None, "out": None, "plot": None}, "found": found}
        args.out.write_text(json.dumps(record | environment(), indent=1) + "\n")


if __name__ == "__main__":
    main()
