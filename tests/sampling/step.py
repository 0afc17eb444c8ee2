"""Runs the device sampler the way an engine does, for a list of requests."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import numpy as np

from jaxpaged import sampler
from jaxpaged.sampling_params import SamplingParams
from jaxpaged.sampling_rows import (
    SamplingTable,
    bias_rules,
    needs_state,
    output_counts_row,
    prompt_mask_row,
)

MAX_LOGPROBS = 5


@partial(jax.jit, static_argnames=("max_logprobs", "logprobs_mode"), donate_argnames="state")
def compiled_sample(
    logits: jax.Array,
    state: sampler.SamplerState,
    batch: sampler.SamplingBatch,
    *,
    max_logprobs: int,
    logprobs_mode: sampler.LogprobsMode = "raw_logprobs",
) -> tuple[sampler.SampleOutput, sampler.SamplerState]:
    """A token for each row, and the state with those tokens counted."""
    output = sampler.choose(logits, state, batch, max_logprobs=max_logprobs, logprobs_mode=logprobs_mode)
    return output, sampler.count_tokens(state, batch.rows, output.tokens)


compiled_set_row = jax.jit(sampler.set_row, donate_argnums=0)


@dataclass
class Request:
    logits: np.ndarray
    params: SamplingParams
    seed: int = 0
    position: int = 0
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)


def bias_of(request: Request) -> np.ndarray | None:
    rules = bias_rules(request.params, len(request.logits))
    return None if rules is None else rules.row(request.output)


def sample_step(
    requests: Sequence[Request],
    *,
    engine_rows: Sequence[int] | None = None,
    num_rows: int | None = None,
    batch_size: int | None = None,
    logprobs_mode: sampler.LogprobsMode = "raw_logprobs",
) -> sampler.SampleOutput:
    """Sample one token for each request; the arrays are cut to the requests, padding removed."""
    vocab_size = len(requests[0].logits)
    engine_rows = engine_rows or range(1, len(requests) + 1)
    num_rows = num_rows or max(engine_rows) + 1
    batch_size = batch_size or len(requests)
    state = sampler.init_sampler_state(num_rows, vocab_size)
    table = SamplingTable(num_rows)
    for row, request in zip(engine_rows, requests, strict=True):
        table.set(row, request.params, request.seed)
        if needs_state(request.params):
            bias = bias_of(request)
            table.set_bias(row, bias is not None)
            state = compiled_set_row(
                state,
                np.int32(row),
                output_counts_row(request.output, vocab_size),
                prompt_mask_row(request.prompt, vocab_size),
                np.zeros(vocab_size, np.float32) if bias is None else bias,
            )
    table.check_invariants()
    padding = [0] * (batch_size - len(requests))
    rows = np.array([*engine_rows, *padding], np.int32)
    positions = np.array([*(request.position for request in requests), *padding], np.int32)
    logits = np.zeros((batch_size, vocab_size), np.float32)
    for place, request in enumerate(requests):
        logits[place] = request.logits
    output, _ = compiled_sample(
        logits, state, table.batch(rows, positions), max_logprobs=MAX_LOGPROBS, logprobs_mode=logprobs_mode
    )
    return jax.tree.map(lambda array: np.asarray(array)[: len(requests)], output)


def draws(request: Request, count: int) -> np.ndarray:
    """``count`` tokens of one request at consecutive positions: int32 [count]."""
    vocab_size = len(request.logits)
    state = sampler.init_sampler_state(2, vocab_size)
    table = SamplingTable(2)
    table.set(1, request.params, request.seed)
    batch = table.batch(np.ones(count, np.int32), np.arange(count, dtype=np.int32))
    logits = np.tile(request.logits, (count, 1))
    return np.asarray(compiled_sample(logits, state, batch, max_logprobs=MAX_LOGPROBS)[0].tokens)
