"""``jaxpaged demo``: the engine at work in a minute; the first token as early as can be."""

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console

from jaxpaged import __version__
from jaxpaged.serve.demo_view import block_picture, view_for
from jaxpaged.serve.options import EngineOptions
from jaxpaged.serve.process_clock import seconds_since_start
from jaxpaged.serve.terminal import counted, facts_table, percent, seconds, size, stdout, waiting

if TYPE_CHECKING:
    from jaxpaged import Engine, RequestOutput, SamplingParams

PROMPTS = (
    "import os\nimport sys\n\ndef main(",
    "class Queue:\n    def __init__(self, maxsize",
    "def read_lines(path):\n    ",
    "class Point:\n    def __eq__(self, other):\n        if ",
)
SHARED = '''"""A stack and a queue, both over lists."""


class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        return self.items.pop()


class Queue:
    def __init__(self):
        self.items = []

    def '''
ENDINGS = ("push(self, ", "pop(self", "__len__(self", "__repr__(self")
NUM_BLOCKS = 512  # enough for all of it, and quicker to fill with zeros than a quarter of the memory
SEED = 3
FORK_TOKENS = 24  # a few of them, so that own blocks come after the shared ones


def run_demo(max_tokens: int, options: EngineOptions) -> None:
    """Completes some Python in one batch, shows shared blocks and cached prefixes, and prints a table."""
    console = stdout()
    model = "the embedded model" if options.is_embedded else str(options.model)
    console.print(f"[bold]jaxpaged {__version__}[/] ", end="")
    console.print(model, markup=False, style="dim", soft_wrap=True)
    with waiting("loading the model"):
        # Text that comes token by token is what a demo is for, and it means a program less to compile.
        engine = options.open(num_blocks=NUM_BLOCKS, num_scheduler_steps=1)
    with engine:
        if engine.tokenizer is None:
            raise ValueError(f"--model={options.model}: the demo needs a tokenizer.json, which is not there")
        demo = Demo(engine, console, seed=SEED if options.seed is None else options.seed)
        demo.one_batch(max_tokens)
        demo.forks()
        demo.shared_prefix()
        demo.table()


class Demo:
    """Runs the parts of the demo on one engine and keeps what the table tells."""

    def __init__(self, engine: "Engine", console: Console, *, seed: int) -> None:
        self._engine, self._console, self._seed = engine, console, seed
        self._first_token: float | None = None
        self._step_seconds = 0.0
        self._host_total = 0.0
        self._host_seconds: list[
            float
        ] = []  # of each step; compiling a rarely used program counts as host work
        self._peak_blocks = 0
        self._blocks_saved = 0

    def one_batch(self, max_tokens: int) -> None:
        """Different prompts, batched continuously."""
        from jaxpaged import RequestOutputKind, SamplingParams

        self._heading("Four requests, one batch")
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=0.5,
            top_p=0.95,
            frequency_penalty=0.2,  # a small model soon repeats itself
            seed=self._seed,
            output_kind=RequestOutputKind.DELTA,
        )
        names = self._send(PROMPTS, params)
        with waiting("compiling for the first step"):
            outputs = self._step()
        with view_for(self._console, dict(zip(names, PROMPTS, strict=True))) as view:
            while outputs or self._engine.has_unfinished_requests:
                for output in outputs:
                    view.add(output.request_id, output.outputs[0].text)
                    if output.finished:
                        view.finish(output.request_id)
                outputs = self._step()

    def forks(self) -> None:
        """Several completions of a prompt, which share its blocks."""
        from jaxpaged import RequestOutputKind, SamplingParams

        self._heading("One prompt, four completions (n=4)")
        params = SamplingParams(
            n=4,
            max_tokens=FORK_TOKENS,
            temperature=0.8,
            seed=self._seed,
            ignore_eos=True,  # for a picture of four long tables
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        copied = self._engine.stats().blocks_copied
        [name] = self._send([SHARED], params)
        tables: list[list[int]] = []
        while self._engine.has_unfinished_requests:
            self._step()
            now = self._engine.block_tables().get(name, [])
            if now and all(now):  # an ended completion has given its blocks back
                tables = now
        mapped, held = sum(map(len, tables)), len({block for table in tables for block in table})
        self._blocks_saved = mapped - held
        self._console.print("Their block tables towards the end; [bold cyan]shared blocks[/] in colour:")
        for line in block_picture(tables):
            self._console.print(line, soft_wrap=True)
        copies = self._engine.stats().blocks_copied - copied
        self._console.print(
            f"{held} blocks instead of {mapped}; the prompt's last, half full one was copied"
            f" {counted(copies, 'time')}, when several wrote to it.",
            style="dim",
        )

    def shared_prefix(self) -> None:
        """Requests that begin alike find the beginning computed."""
        from jaxpaged import SamplingParams

        self._heading("Four requests that begin with the same text")
        params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
        last: dict[str, RequestOutput] = {}
        names = self._send([SHARED + ending for ending in ENDINGS], params)
        while self._engine.has_unfinished_requests:
            last |= {output.request_id: output for output in self._step()}
        for name, ending in zip(names, ENDINGS, strict=True):
            output = last[name]
            text = " ".join(output.outputs[0].text.partition("\n\n")[0].split())
            self._console.print(f"  [bold]def {ending}[/]", end="", highlight=False)
            self._console.print(text, markup=False, overflow="ellipsis", no_wrap=True)
        cached = sum(output.num_cached_tokens for output in last.values())
        prompts = sum(len(output.prompt_token_ids) for output in last.values())
        self._console.print(
            f"{cached} of {prompts} prompt tokens were in the cache and not computed again.", style="dim"
        )

    def table(self) -> None:
        """What all of it took."""
        stats = self._engine.stats()
        running = max(self._step_seconds - stats.compile_time, 1e-9)
        pool = f"{counted(self._peak_blocks, 'block')} of {stats.num_blocks:,} at most, {self._block_size}"
        rows = [
            ("first token", f"{seconds(self._first_token)} after the start of the process"),
            ("speed", f"{stats.num_generation_tokens / running:,.0f} tokens/s, compiling left out"),
            ("tokens", f"{stats.num_generation_tokens:,} in {counted(stats.num_steps, 'step')}"),
            ("host work", f"{seconds(median(self._host_seconds))} a step (median)"),
            ("KV pool", pool),
            ("shared by n=4", f"{counted(self._blocks_saved, 'block')} saved"),
            (
                "prefix cache",
                f"{stats.prefix_cache_hits:,} of {stats.prefix_cache_queries:,} prompt tokens found",
            ),
            ("padding", f"{percent(stats.padding_waste)} of the computed tokens"),
            ("compiled", f"{counted(stats.num_compiles, 'program')} in {seconds(stats.compile_time)}"),
        ]
        self._console.print()
        self._console.print(facts_table("In numbers", rows))

    @property
    def _block_size(self) -> str:
        return f"{size(self._engine.memory_report().block)} each"

    def _heading(self, text: str) -> None:
        self._console.print()
        self._console.print(text, style="bold", markup=False)

    def _send(self, prompts: Sequence[str | Mapping[str, object]], params: "SamplingParams") -> list[str]:
        names = [f"{time.monotonic_ns()}-{at}" for at in range(len(prompts))]
        for name, prompt in zip(names, prompts, strict=True):
            self._engine.add_request(name, prompt, params)
        return names

    def _step(self) -> "list[RequestOutput]":
        begun = time.perf_counter()
        outputs = self._engine.step()
        self._step_seconds += time.perf_counter() - begun
        for output in outputs:
            if output.error is not None:
                raise output.error
        if self._first_token is None and outputs:
            self._first_token = seconds_since_start()
        stats = self._engine.stats()
        host = stats.schedule_time + stats.build_time + stats.update_time
        self._host_seconds.append(host - self._host_total)
        self._host_total = host
        self._peak_blocks = max(self._peak_blocks, stats.num_blocks - stats.num_free_blocks)
        return outputs
