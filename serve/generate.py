"""``jaxpaged generate``: completes prompts, all of them in one batch, and streams the text."""

import dataclasses
import json
import time
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.rule import Rule

from jaxpaged.serve.lanes import Lanes
from jaxpaged.serve.options import EngineOptions, SamplingOptions
from jaxpaged.serve.prompts import Prompt
from jaxpaged.serve.terminal import counted, seconds, stderr, stdout, waiting, write

if TYPE_CHECKING:
    from jaxpaged import Engine, RequestOutput, SamplingParams

MAX_TOKENS = 128


def run_generate(
    prompts: list[Prompt],
    sampling: SamplingOptions,
    options: EngineOptions,
    *,
    stream: bool,
    echo: bool | None,
    as_json: bool,
) -> None:
    """Completes the prompts and prints texts, or a JSON object a line.

    stream: print as the text comes, not when all is done. echo: print prompts as well; None: on a terminal.
    """
    console, messages = stdout(), stderr()
    seed = {} if options.seed is None else {"seed": options.seed}
    params = sampling.params(max_tokens=MAX_TOKENS, **seed)
    with waiting("loading the model"):
        engine = options.open()
    with engine:
        begun = time.monotonic()
        if as_json:
            outputs = _print_json(engine, prompts, params)
        else:
            echo = console.is_terminal if echo is None else echo
            outputs = _Printer(engine, console, prompts, params, echo=echo, stream=stream).run()
        if messages.is_terminal and console.is_terminal:
            messages.print(_summary(engine, outputs, begun), style="dim")


def _summary(engine: "Engine", outputs: "list[RequestOutput]", begun: float) -> str:
    stats = engine.stats()
    took = time.monotonic() - begun
    first = min(
        (o.metrics.first_token_time for o in outputs if o.metrics and o.metrics.first_token_time),
        default=begun,
    )
    running = max(took - stats.compile_time, 1e-9)
    text = f"{counted(stats.num_generation_tokens, 'token')}, {stats.num_generation_tokens / running:.0f} tokens/s"
    text += f", first one after {seconds(first - begun)}"
    if stats.num_compiles:
        text += f" ({counted(stats.num_compiles, 'program')} compiled in {seconds(stats.compile_time)})"
    return text


def _print_json(engine: "Engine", prompts: list[Prompt], params: "SamplingParams") -> "list[RequestOutput]":
    """A line for each prompt, in their order."""
    outputs = engine.generate(prompts, params)
    for output in outputs:
        print(json.dumps(as_plain(output), ensure_ascii=False))
    return outputs


def as_plain(output: "RequestOutput") -> dict[str, Any]:
    """An output as JSON's own types; log-probabilities are objects by token id, minus infinity is null."""
    plain = dataclasses.asdict(output)
    plain["error"] = None if output.error is None else str(output.error)
    return {name: _finite(value) for name, value in plain.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value


class _Printer:
    """Runs a batch and prints its texts in the order of the prompts, live as far as that order allows."""

    def __init__(
        self,
        engine: "Engine",
        console: Console,
        prompts: list[Prompt],
        params: "SamplingParams",
        *,
        echo: bool,
        stream: bool,
    ) -> None:
        from jaxpaged import RequestOutputKind

        self._engine, self._console, self._echo = engine, console, echo
        self._prompts = prompts
        kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
        self._params = params.clone(output_kind=kind)
        keys = [(at, index) for at in range(len(prompts)) for index in range(params.n)]
        self._has_headers = len(keys) > 1
        self._lanes = Lanes(keys, self._write, begin=self._begin, end=self._end)
        self._ends_line = True

    def run(self) -> "list[RequestOutput]":
        """Returns the last output of each request."""
        requests = [str(at) for at in range(len(self._prompts))]
        for name, prompt in zip(requests, self._prompts, strict=True):
            self._engine.add_request(name, prompt, self._params)
        last: dict[str, RequestOutput] = {}
        with waiting("compiling for the first step"):
            outputs = self._engine.step()
        while outputs or self._engine.has_unfinished_requests:
            for output in outputs:
                if output.error is not None:
                    raise output.error
                last[output.request_id] = output
                self._take(output)
            outputs = self._engine.step()
        return [last[name] for name in requests]

    def _take(self, output: "RequestOutput") -> None:
        for completion in output.outputs:
            key = (int(output.request_id), completion.index)
            has_text = self._engine.tokenizer is not None
            text = completion.text if has_text else "".join(f"{i} " for i in completion.token_ids)
            self._lanes.add(key, text)
            if completion.finished:
                self._lanes.finish(key)

    def _begin(self, key: Hashable) -> None:
        assert isinstance(key, tuple)
        at, index = key
        if self._has_headers:
            title = f"prompt {at + 1} of {len(self._prompts)}" if len(self._prompts) > 1 else ""
            if self._params.n > 1:
                title += (", " if title else "") + f"completion {index + 1} of {self._params.n}"
            self._console.print(Rule(title, style="dim", align="left"))
        prompt = self._prompts[at]
        if self._echo and isinstance(prompt, str):
            write(self._console, prompt, style="dim")

    def _write(self, text: str) -> None:
        write(self._console, text)
        self._ends_line = text.endswith("\n") if text else self._ends_line

    def _end(self, key: Hashable) -> None:
        if not self._ends_line or self._echo:
            self._console.print()
        self._ends_line = True
