"""A minute of users who do anything at any time, in far too little memory; then everything must be gone.

    python benchmarks/stress.py --seconds 60 --rate 200 --async-scheduling

Requests of all kinds come, are forked, aborted, dropped in mid-stream, and push each other out of a small pool to the
host and back. Once a second all invariants of the host state are checked; greedy tokens of the same prompt
must agree whatever happened meanwhile. At the end all are aborted: no block of the pool or the host may be held.
Prints a table; exits 1 when something is wrong.
"""

import argparse
import logging
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flax import nnx

from jaxpaged import Engine, RequestOutput, SamplingParams
from jaxpaged.errors import InvalidRequestError
from jaxpaged.models import Decoder, ModelConfig, embedded_model_path

NUM_PROMPTS = 40
NEAR_TIE = 1e-3  # difference of two log-probabilities that another order of additions may turn round
MIB = 2**20

TINY = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=384,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    sliding_windows=(None, None),
    max_position_embeddings=128,
    eos_token_ids=(1,),
)
# One of the longest requests takes most of the pool.
TINY_SIZES = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 16,
    "max_model_len": 128,
    "block_size": 4,
    "num_blocks": 40,
}
SIZES = {
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,
    "max_model_len": 256,
    "block_size": 8,
    "num_blocks": 80,
}


@dataclass
class Said:
    """What greedy decoding has said so far after each prompt, and where two requests differed."""

    tokens: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    differences: list[tuple[list[int], int, int]] = field(default_factory=list)  # prefix, two next tokens
    num_compared: int = 0

    def compare(self, root: tuple[int, ...], tokens: list[int]) -> None:
        """Takes in a prompt with its continuation."""
        known = self.tokens.setdefault(root, [])
        self.num_compared += min(len(known), len(tokens)) - min(len(known), len(root))
        for at, (one, other) in enumerate(zip(known, tokens, strict=False)):
            if one != other:
                self.differences.append((tokens[:at], one, other))
                return
        if len(tokens) > len(known):
            self.tokens[root] = tokens

    def wrong(self, engine: Engine) -> int:
        """How many of the differences are more than a near tie."""
        wrong = 0
        for prefix, *both in self.differences:
            (output,) = engine.generate(prefix, SamplingParams(temperature=0.0, max_tokens=1, logprobs=5))
            (found,) = output.outputs[0].logprobs or [{}]
            best = max(each.logprob for each in found.values())
            near = [token for token in both if token in found and best - found[token].logprob < NEAR_TIE]
            wrong += len(near) < len(both)
        return wrong


class Crowd:
    """Users of one engine; ``act`` lets one of them do something at random."""

    def __init__(self, engine: Engine, rng: random.Random) -> None:
        self.engine = engine
        self.rng = rng
        self.said = Said()
        self.actions: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self.live: dict[
            str, tuple[int, ...] | None
        ] = {}  # to the prompt whose greedy tokens it says, if it does
        self.streams: dict[str, Iterator[RequestOutput]] = {}
        self.errors: list[Exception] = []
        self._num_names = 0
        self.longest = engine.config.max_model_len
        stems = [self._tokens(self.longest // 3) for _ in range(4)]
        self.prompts = [
            (
                *rng.choice(stems)[: rng.randint(0, self.longest // 3)],
                *self._tokens(rng.randint(1, self.longest // 6)),
            )
            for _ in range(NUM_PROMPTS)
        ]
        self._choices: list[Callable[[], str]] = (
            [self.add] * 45 + [self.abort] * 15 + [self.fork] * 15 + [self.stream] * 10 + [self.drop] * 10
            + [self.pin] * 2 + [self.unpin] * 2 + [self.mistake]
        )  # fmt: skip

    def act(self) -> None:
        """One action."""
        choice = self.rng.choice(self._choices)
        if len(self.engine.block_tables()) > 3 * self.engine.config.max_num_seqs:
            choice = self.rng.choice([self.abort, self.drop])
        self.actions[choice()] += 1

    def _tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(2, 384) for _ in range(count)]

    def _name(self) -> str:
        self._num_names += 1
        return f"r{self._num_names}"

    def _params(self) -> SamplingParams:
        kind = self.rng.randrange(10)
        params = SamplingParams(
            temperature=0.0, max_tokens=self.rng.randint(1, self.longest // 3), ignore_eos=True
        )
        if kind == 0:
            return params.clone(temperature=0.8, seed=self.rng.randrange(99), repetition_penalty=1.2)
        if kind == 1:
            return params.clone(logit_bias={5: 2.0, 6: -3.0}, min_tokens=1)
        if kind == 2:
            return params.clone(logprobs=2, prompt_logprobs=1)
        return params.clone(n=2 if kind == 3 else 1)

    def add(self) -> str:
        """A request comes."""
        name, prompt, params = self._name(), self.rng.choice(self.prompts), self._params()
        self.engine.add_request(
            name,
            list(prompt),
            params,
            priority=self.rng.randint(-2, 2),
            tenant=self.rng.choice(["", "a", "b"]),
            deadline=self.rng.uniform(0.02, 0.5) if self.rng.random() < 0.1 else None,
        )
        self.live[name] = prompt if _is_plain(params) else None
        return "add"

    def abort(self) -> str:
        """A request is not wanted any more."""
        names = [name for name in self.engine.block_tables() if name not in self.streams]
        if not names:
            return "nothing"
        self.engine.abort_request(self.rng.choice(names))
        return "abort"

    def fork(self) -> str:
        """A request branches, with the same continuation or another."""
        tables = self.engine.block_tables()
        if not tables:
            return "nothing"
        parent, name = self.rng.choice(list(tables)), self._name()
        tokens = self.engine._live.generations[parent].completions[0].request.token_ids
        at = self.rng.randint(1, len(tokens)) if self.rng.random() < 0.5 else None
        appended = self._tokens(self.rng.choice([0, 0, 1, 3]))
        if (len(tokens) if at is None else at) + len(appended) > self.longest - 2:
            return "nothing"
        params = SamplingParams(temperature=0.0, max_tokens=self.rng.randint(1, 30), ignore_eos=True)
        self.engine.fork(parent, name, at=at, append_token_ids=appended, params=params)
        root = self.live.get(parent)
        goes_on = not appended and root is not None and (at is None or at >= len(root))
        self.live[name] = root if goes_on else None
        return "fork"

    def stream(self) -> str:
        """A request comes whose tokens are read one by one."""
        name, prompt, params = self._name(), self.rng.choice(self.prompts), self._params()
        self.streams[name] = self.engine.stream(list(prompt), params, request_id=name)
        self.live[name] = None
        return "stream"

    def drop(self) -> str:
        """A reader reads on, or goes away."""
        if not self.streams:
            return "nothing"
        name = self.rng.choice(list(self.streams))
        if self.rng.random() < 0.7 and any(True for _, _ in zip(range(2), self.streams[name], strict=False)):
            return "read"
        self.streams.pop(name)
        self.live.pop(name, None)
        return "drop"

    def pin(self) -> str:
        """A prefix is to stay."""
        try:
            prompt = list(self.rng.choice(self.prompts))
            self.engine.pin_prefix(
                prompt, pin_id=f"pin{self.rng.randrange(3)}", ttl=self.rng.choice([None, 0.5])
            )
        except InvalidRequestError:  # more than half of the pool
            return "pin refused"
        return "pin"

    def unpin(self) -> str:
        """A prefix may go."""
        try:
            self.engine.unpin_prefix(f"pin{self.rng.randrange(3)}")
        except InvalidRequestError:  # it has gone before
            return "nothing"
        return "unpin"

    def mistake(self) -> str:
        """Something that must be refused."""
        try:
            self.engine.add_request(self._name(), [-1, 3])
        except InvalidRequestError:
            return "mistake"
        raise AssertionError("a wrong prompt was taken")

    def step(self) -> None:
        """One step of the engine."""
        for output in self.engine.step():
            self._take(output)

    def _take(self, output: RequestOutput) -> None:
        if output.error is not None:
            self.errors.append(output.error)
        root = self.live.get(output.request_id)
        if output.finished:
            self.live.pop(output.request_id, None)
            self.finished.update(str(c.finish_reason) for c in output.outputs)
            for completion in output.outputs if root is not None else []:
                self.said.compare(root or (), output.prompt_token_ids + completion.token_ids)

    def leave(self) -> None:
        """Everybody goes."""
        for name in self.streams:
            self.live.pop(name, None)
        self.streams.clear()
        for name in self.engine.block_tables():
            self.engine.abort_request(name)
        for number in range(3):
            try:
                self.engine.unpin_prefix(f"pin{number}")
            except InvalidRequestError:
                continue
        while self.engine.has_unfinished_requests:
            self.step()


def _is_plain(params: SamplingParams) -> bool:
    return params.temperature == 0.0 and params.logit_bias is None


def resident_bytes() -> int:
    """Physical memory of this process; 0 where the system does not tell."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0


def run(engine: Engine, seconds: float, rate: float, seed: int) -> tuple[dict[str, Any], list[str]]:
    """The minute. Returns what to print, and what was wrong."""
    crowd = Crowd(engine, random.Random(seed))
    begun = next_check = time.monotonic()
    num_acted = num_checks = warm_bytes = max_live = 0
    while (now := time.monotonic()) < begun + seconds:
        while num_acted < (now - begun) * rate:
            crowd.act()
            num_acted += 1
        crowd.step()
        max_live = max(max_live, engine.stats().num_blocks - engine.stats().num_free_blocks)
        if now >= next_check:
            engine.check_invariants()
            num_checks, next_check = num_checks + 1, next_check + 1.0
            if not warm_bytes and now >= begun + seconds / 3:
                warm_bytes = resident_bytes()
    grown = resident_bytes() - warm_bytes
    crowd.leave()
    engine.check_invariants()
    wrong = left_over(engine, crowd)
    space = engine._live.scheduler.space
    moves = space.stats
    stats = engine.stats()
    table = {
        "seconds, actions, checks of all invariants": f"{time.monotonic() - begun:.0f}, {num_acted}, {num_checks}",
        "actions": _counts(crowd.actions),
        "finished": _counts(crowd.finished),
        "steps, tokens computed, tokens generated": (
            f"{stats.num_steps}, {stats.num_tokens}, {stats.num_generation_tokens}"
        ),
        "preemptions": _counts(engine._live.scheduler.preemption.counts),
        "blocks swapped out, in": f"{moves.swapped_out}, {moves.swapped_in}",
        "prefix blocks evicted, to the host, back": f"{moves.evicted}, {moves.demoted}, {moves.promoted}",
        "blocks copied on write": str(moves.copied),
        "most blocks held at a time": f"{max_live} of {stats.num_blocks}",
        "greedy tokens compared, near ties": f"{crowd.said.num_compared}, {len(crowd.said.differences)}",
        "blocks held at the end, of the host": (
            f"{stats.num_blocks - stats.num_free_blocks}, {space.host.num_held if space.host else 0}"
        ),
        "memory grown in the last two thirds": f"{grown / MIB:.1f} MiB of {resident_bytes() / MIB:.0f}",
    }
    return table, wrong


def left_over(engine: Engine, crowd: Crowd) -> list[str]:
    """What must not be, after everybody has left."""
    wrong = [f"a request ended with {error!r}" for error in crowd.errors]
    stats, space = engine.stats(), engine._live.scheduler.space
    if stats.num_free_blocks != stats.num_blocks:
        wrong.append(f"{stats.num_blocks - stats.num_free_blocks} blocks are held")
    if space.host is not None and space.host.num_held:
        wrong.append(f"{space.host.num_held} host blocks are held")
    if engine.block_tables() or crowd.live:
        wrong.append(f"requests without an end: {sorted(engine.block_tables())} {sorted(crowd.live)}")
    if num_wrong := crowd.said.wrong(engine):
        wrong.append(f"{num_wrong} requests said something else than others after the same prompt")
    return wrong


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common()) or "none"


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds the engine, runs, prints; 1 when something was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=200.0, help="actions a second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny random model in place of the embedded one"
    )
    parser.add_argument("--async-scheduling", action="store_true")
    parser.add_argument("--preemption-mode", default="swap", choices=("swap", "recompute", "auto"))
    parser.add_argument("--max-growth", type=float, default=64.0, help="MiB that memory may grow")
    parser.add_argument("--compilation-cache-dir", type=Path)
    args = parser.parse_args(arguments)
    model: Any = embedded_model_path()
    if args.tiny:
        model = Decoder(TINY, rngs=nnx.Rngs(0), dtype="float32", param_dtype="float32")
    sizes: dict[str, Any] = dict(TINY_SIZES if args.tiny else SIZES)
    threads = threading.active_count()
    with Engine(
        model,
        dtype="float32",
        num_host_blocks=60,
        preemption_mode=args.preemption_mode,
        async_scheduling=args.async_scheduling,
        scheduling_policy="priority",
        num_scheduler_steps=1,
        memory_warning=1.0,
        memory_critical=1.0,
        warmup=True,
        compilation_cache_dir=args.compilation_cache_dir,
        **sizes,
    ) as engine:
        table, wrong = run(engine, args.seconds, args.rate, args.seed)
        grown = float(table["memory grown in the last two thirds"].split()[0])
    if grown > args.max_growth:
        wrong.append(f"memory has grown by {grown} MiB")
    if threading.active_count() > threads:
        wrong.append("a thread is left")
    for name, value in table.items():
        print(f"{name:45} {value}")
    print("\n".join(f"WRONG: {each}" for each in wrong) or "nothing is left")
    return 1 if wrong else 0


if __name__ == "__main__":
    logging.getLogger("jaxpaged").setLevel(logging.ERROR)  # thousands of preemptions
    sys.exit(main())
