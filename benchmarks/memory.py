"""What paged memory, its cache and its pressure cost: the figures of the memory system, each against its plain form.

    python benchmarks/memory.py --size small --out memory.json

* KV waste: slots of live blocks that hold no token, averaged over W1's steps, weighted by live slots.
* Prefix caching where nothing is ever found: the time of W1 with it over the time without, in turns.
* Shared prefixes: prompt tokens that W3 computes over its distinct prompt tokens.
* Pressure: W1 with a quarter of the blocks it uses at most, by recompute, by swap and by estimated cost: tokens equal
  to those of the full pool, and time over that of the full pool.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__:
    from benchmarks.workloads import Request, make_checkpoint, make_workloads
else:
    from workloads import Request, make_checkpoint, make_workloads

from jaxpaged import Engine, RequestOutputKind, SamplingParams
from jaxpaged.serve.environment import environment

MAX_MODEL_LEN = 1024


def serve(
    engine: Engine, requests: list[Request], each_step: Callable[[], None] | None = None
) -> tuple[float, list[list[int]]]:
    """Seconds for all requests at once, and their tokens."""
    engine.reset_prefix_cache()
    done: dict[str, list[int]] = {}
    started = time.perf_counter()
    for index, request in enumerate(requests):
        params = SamplingParams(
            temperature=0.0, ignore_eos=True, max_tokens=request.out, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        engine.add_request(str(index), list(request.prompt), params)
    while engine.has_unfinished_requests:
        for output in engine.step():
            done[output.request_id] = output.outputs[0].token_ids
        if each_step is not None:
            each_step()
    return time.perf_counter() - started, [done[str(index)] for index in range(len(requests))]


class Usage:
    """Watches the pool between steps."""

    def __init__(self, engine: Engine) -> None:
        self._scheduler = engine._live.scheduler
        self.max_live = self.slots = self.tokens = 0

    def __call__(self) -> None:
        space = self._scheduler.space
        live = space.allocator.num_live
        self.max_live = max(self.max_live, live)
        self.slots += live * space.block_size
        # W1's prompts share nothing, so every token has a slot of its own.
        self.tokens += sum(request.num_computed_tokens for request in self._scheduler.running)

    @property
    def waste(self) -> float:
        """Share of live slots without a token."""
        return 1.0 - self.tokens / self.slots


def in_turns(engines: dict[str, Engine], requests: list[Request], repeats: int) -> dict[str, list[float]]:
    """Seconds of each engine, after one run that compiles."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    for repeat in range(repeats + 1):
        for name, engine in engines.items():
            seconds, _ = serve(engine, requests)
            if repeat:
                times[name].append(seconds)
    return times


def ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    """Median of the ratios of runs that followed each other."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def pressure(
    new_engine: Callable[..., Engine], requests: list[Request], num_blocks: int, repeats: int
) -> dict[str, Any]:
    """W1 in a quarter of the blocks, each way of giving them up beside the full pool."""
    quarter = num_blocks // 4 + 1
    found: dict[str, Any] = {"blocks": num_blocks, "quarter": quarter}
    with new_engine(num_blocks=num_blocks + 1) as full:
        _, wanted = serve(full, requests)
        for mode in ("recompute", "swap", "auto"):
            host = 0 if mode == "recompute" else num_blocks
            with new_engine(num_blocks=quarter, preemption_mode=mode, num_host_blocks=host) as engine:
                _, tokens = serve(engine, requests)
                times = in_turns({"full": full, mode: engine}, requests, repeats)
                stats = engine._live.scheduler
                found[mode] = {
                    "identical": tokens == wanted,
                    "time_ratio": ratio(times, mode, "full"),
                    "preemptions": dict(stats.preemption.counts),
                    "swapped_in": stats.space.stats.swapped_in,
                }
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="small", help="of the checkpoint: small or medium")
    parser.add_argument("--folder", type=Path, default=Path(".cache/benchmarks"), help="for checkpoints")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--async-scheduling", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    checkpoint = make_checkpoint(args.size, args.folder / args.size)
    workloads = make_workloads()

    def new_engine(**arguments: Any) -> Engine:
        return Engine(
            checkpoint, max_model_len=MAX_MODEL_LEN, async_scheduling=args.async_scheduling,
            compilation_cache_dir=args.folder / "compiled", **arguments,
        )  # fmt: skip

    found: dict[str, Any] = {}
    with new_engine() as cached, new_engine(enable_prefix_caching=False) as plain:
        usage = Usage(cached)
        serve(cached, workloads["W1"], usage)
        found["kv_waste"] = usage.waste
        print(f"KV waste on W1: {100 * usage.waste:.2f} % of the live slots")
        times = in_turns({"cached": cached, "plain": plain}, workloads["W1"], args.repeats)
        found["cache_without_hits"] = ratio(times, "cached", "plain")
        print(f"prefix caching without hits: {found['cache_without_hits']:.4f} x the time without it")
        before = cached.stats()
        serve(cached, workloads["W3"])
        after = cached.stats()
        prompts = {request.prompt for request in workloads["W3"]}
        outputs = sum(request.out - 1 for request in workloads["W3"])
        computed = after.num_tokens - before.num_tokens - outputs
        distinct = 512 + 32 * len(prompts)
        found["w3_prefill"] = {"computed": computed, "distinct": distinct}
        print(
            f"W3 computes {computed} prompt tokens, {distinct} are distinct, {544 * len(prompts)} were sent"
        )
    found["pressure"] = pressure(new_engine, workloads["W1"], usage.max_live, args.repeats)
    for mode in ("recompute", "swap", "auto"):
        each = found["pressure"][mode]
        same = "identical tokens" if each["identical"] else "OTHER TOKENS"
        print(f"W1 in a quarter of the blocks, {mode}: {each['time_ratio']:.2f} x the time, {same}, {each}")
    if args.out:
        command = {"size": args.size, "repeats": args.repeats, "async_scheduling": args.async_scheduling}
        args.out.write_text(json.dumps({"command": command, "found": found} | environment(), indent=1) + "\n")


if __name__ == "__main__":
    main()
