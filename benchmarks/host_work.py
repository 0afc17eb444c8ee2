"""Host work of a step: schedule, build and update, with the device's part left out.

    python benchmarks/host_work.py --rows 64

The program of a step is replaced by one that returns at once, so the processor's caches stay warm: this is what the
host costs beside a device that has its own. On a CPU, where the step itself empties the caches, the same
work takes several times as long; ``run.py`` reports that figure.
"""

import argparse
import statistics
from types import SimpleNamespace
from typing import Any

import numpy as np

from jaxpaged import Engine, RequestOutputKind, SamplingParams
from jaxpaged.models import embedded_model_path

PARTS = ("schedule_time", "build_time", "update_time")


def step_times(engine: Engine, rows: int, detokenize: bool, tokens: int) -> list[list[float]]:
    """Microseconds of the three parts in each step of ``rows`` requests that produce ``tokens`` tokens."""
    rng = np.random.default_rng(0)
    params = SamplingParams(
        temperature=0.0,
        ignore_eos=True,
        max_tokens=tokens,
        detokenize=detokenize,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    for index in range(rows):
        engine.add_request(f"{detokenize}-{index}", rng.integers(1, 4000, 100).tolist(), params)
    times, before = [], engine.stats()
    while engine.has_unfinished_requests:
        engine.step()
        after = engine.stats()
        times.append([1e6 * (getattr(after, part) - getattr(before, part)) for part in PARTS])
        before = after
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=300, help="output tokens of each request")
    args = parser.parse_args()
    limits = {
        "max_num_seqs": args.rows,
        "max_num_batched_tokens": max(1024, args.rows),
        "max_model_len": 1024,
    }
    with Engine(embedded_model_path(), num_scheduler_steps=1, **limits) as engine:
        sampled = np.full(args.rows, 7, np.int32)

        def execute(bucket: int, buffer: np.ndarray) -> Any:
            del bucket, buffer
            return SimpleNamespace(sampled=SimpleNamespace(tokens=sampled), prompt=None)

        engine._live.runner.execute = execute  # type: ignore[method-assign]
        for detokenize in (False, True):
            times = step_times(engine, args.rows, detokenize, args.tokens)
            medians = [statistics.median(part) for part in zip(*times, strict=True)]
            parts = ", ".join(f"{n[:-5]} {m:.0f}" for n, m in zip(PARTS, medians, strict=True))
            what = "with text" if detokenize else "token ids only"
            print(f"{args.rows} rows, {what}: {sum(medians):.0f} us a step ({parts})")


if __name__ == "__main__":
    main()
