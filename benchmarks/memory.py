"""What paged memory, its cache and its pressure cost: the figures of the memory system, each against its plain form.

    python benchmarks/memory.py --size small --out memory.json

* KV waste: slots of live blocks that hold no token, averaged over W1's steps, weighted by live slots.
* Prefix caching where nothing is ever found: the time of W1 with it over the time without, in turns in one engine,
  and what its own work takes.
* Shared prefixes: prompt tokens that W3 computes over its distinct prompt tokens.
* Pressure: W1 with a quarter of the blocks it uses at most, by recompute, by swap and by estimated cost: tokens equal
  to those of the full pool, and time over that of the full pool.
"""

import argparse
import inspect
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
from jaxpaged.block_space import BlockSpace
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


class TimeInSpace:
    """Seconds spent in the methods of a block space; those that they call are not counted twice."""

    def __init__(self, space: BlockSpace) -> None:
        self.seconds = 0.0
        self._inside = False
        for name in dir(space):
            if not name.startswith("_") and inspect.ismethod(method := getattr(space, name)):
                setattr(space, name, self._timed(method))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            if self._inside:
                return method(*arguments)
            self._inside, started = True, time.perf_counter()
            try:
                return method(*arguments)
            finally:
                self.seconds += time.perf_counter() - started
                self._inside = False

        return timed


def neighbour_ratios(first: list[float], second: list[float]) -> list[float]:
    """Of runs in turns, the time of each of the first kind over that of each neighbour of the second kind."""
    after = [a / b for a, b in zip(first, second, strict=True)]
    return after + [a / b for a, b in zip(first[1:], second, strict=False)]


def without_hits(engine: Engine, requests: list[Request], repeats: int) -> dict[str, float]:
    """What prefix caching costs where nothing is found, by switching it on and off in one engine.

    Two engines differ by more than the cache: where their memory lies, and which is used first. The switch is read
    only when a request looks for its prefix, enters and fills a block; ``serve`` begins each run with no request and
    an empty cache. A whole run still varies by more than the cache costs, so the time in the block space, where all
    of its work is done, is taken as well.
    """
    space = engine._live.scheduler.space
    in_space = TimeInSpace(space)
    whole: dict[bool, list[float]] = {True: [], False: []}
    part: dict[bool, list[float]] = {True: [], False: []}
    serve(engine, requests)
    for enabled in (True, False) * repeats:
        space.enable_prefix_caching = enabled
        hits, before = space.stats.prefix_hits, in_space.seconds
        whole[enabled].append(serve(engine, requests)[0])
        part[enabled].append(in_space.seconds - before)
        assert space.stats.prefix_hits == hits, "these requests share a prefix"
        assert bool(space.allocator.num_cached) == enabled, "the switch did not work"
    space.enable_prefix_caching = True
    ratios = neighbour_ratios(whole[True], whole[False])
    low, middle, high = statistics.quantiles(ratios, n=4)
    plain = statistics.median(whole[False])
    more = statistics.median(a - b for a, b in zip(part[True], part[False], strict=True))
    print(
        f"prefix caching without hits: {middle:.4f} x the time (half of {len(ratios)} ratios in {low:.4f} to "
        f"{high:.4f}), {1000 * more:.1f} ms more in the block space, {100 * more / plain:.2f} % of {plain:.3f} s"
    )
    return {
        "time_ratio": middle,
        "low": low,
        "high": high,
        "seconds": plain,
        "more_in_space": more,
        "share": more / plain,
    }


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
    with new_engine() as engine:
        usage = Usage(engine)
        serve(engine, workloads["W1"], usage)
        found["kv_waste"] = usage.waste
        print(f"KV waste on W1: {100 * usage.waste:.2f} % of the live slots")
        found["cache_without_hits"] = without_hits(engine, workloads["W1"], 3 * args.repeats)
        before = engine.stats()
        serve(engine, workloads["W3"])
        after = engine.stats()
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
