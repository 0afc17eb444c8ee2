"""Sampling on the device: one compiled program per batch size for every mix of sampling parameters.

Per row, in this order: logit bias (which also carries allowed ids, bad words and other bans as -inf), repetition
penalty over prompt and output, presence and frequency penalty over the output; then the largest logit when
the temperature is 0, else temperature, min-p, top-k, top-p and a draw. Everything beyond the greedy choice
lies under ``lax.cond`` on flags that travel with the batch, so a greedy batch pays one pass over its logits,
and turning anything on compiles nothing. A row's token depends on its logits, parameters, seed and position
alone, not on the batch or its place in it.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxpaged import sampler_choice
from jaxpaged.sampler_cutoff import kept_cutoff

LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]

# What a batch needs beyond the greedy choice: the bits of ``SamplingBatch.flags``, OR-ed over its rows.
RANDOM = 1  # some row draws its token
FILTER = 2  # some row that draws has top_k, top_p or min_p on
PENALTY = 4  # some row has a penalty on
BIAS = 8  # some row has a bias row in the state
LOGPROBS = 16  # some row wants the log-probability and rank of its token
TOP_LOGPROBS = 32  # some row wants the most likely tokens as well


class SamplerState(NamedTuple):
    """What sampling remembers of each engine row r; row 0 is never anybody's: it stays all zero but counts.

    output_counts int32 [R, V]: how often the row produced each token. prompt_mask bool [R, V]: whether its
    prompt holds the token. logit_bias float32 [R, V]: added to its logits, -inf for a token that is banned.
    """

    output_counts: Array
    prompt_mask: Array
    logit_bias: Array


class SamplingBatch(NamedTuple):
    """Sampling parameters of the B rows of one step; ``sampling_rows`` fills them.

    rows int32 [B]: engine row of the state, 0 for padding and for rows that need no state. floats float32 [B, 6]:
    temperature, top_p, min_p, repetition, presence and frequency penalty. ints int32 [B, 4]: top_k,
    the seed's low and high word (bits of a uint32), position. flags int32 []: see the constants above.
    """

    rows: Array
    floats: Array
    ints: Array
    flags: Array


class SampleOutput(NamedTuple):
    """tokens int32 [B]; the rest is zero unless the batch's flags ask for it.

    logprob float32 [B] and rank int32 [B] (1 is the most likely) of the token; top_ids int32 and top_logprobs
    float32 [B, max_logprobs], most likely first.
    """

    tokens: Array
    logprob: Array
    rank: Array
    top_ids: Array
    top_logprobs: Array


def init_sampler_state(num_rows: int, vocab_size: int) -> SamplerState:
    """State of ``num_rows`` engine rows (row 0, the dummy, included) that bias and penalise nothing."""
    shape = (num_rows, vocab_size)
    return SamplerState(
        jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.bool_), jnp.zeros(shape, jnp.float32)
    )


def set_row(
    state: SamplerState, row: Array, output_counts: Array, prompt_mask: Array, logit_bias: Array
) -> SamplerState:
    """Replace engine row ``row`` (int32 []) of the state; the other arguments are [V]. Jit with state donated."""
    new = (output_counts, prompt_mask, logit_bias)
    return SamplerState(
        *(lax.dynamic_update_index_in_dim(old, value, row, 0) for old, value in zip(state, new, strict=True))
    )


def set_bias_row(state: SamplerState, row: Array, logit_bias: Array) -> SamplerState:
    """Replace only the bias of engine row ``row``: its counts go on on the device. Jit with state donated."""
    return state._replace(logit_bias=lax.dynamic_update_index_in_dim(state.logit_bias, logit_bias, row, 0))


def choose(
    logits: Array,
    state: SamplerState,
    batch: SamplingBatch,
    *,
    max_logprobs: int,
    logprobs_mode: LogprobsMode = "raw_logprobs",
) -> SampleOutput:
    """One token for each row.

    logits float32 [B, V]; NaN counts as -inf, and a row without a finite logit gives token 0. max_logprobs:
    width of the top arrays. logprobs_mode: "raw_logprobs" are the log-softmax of ``logits``,
    "processed_logprobs" that of what the token was drawn from (greedy rows: before temperature and filters).
    """

    def greedy() -> SampleOutput:
        chunks = sampler_choice.chunked(logits)
        tokens = sampler_choice.argmax(chunks, sampler_choice.chunk_maxima(chunks))
        return SampleOutput(tokens, *_no_logprobs(len(logits), max_logprobs))

    def general() -> SampleOutput:
        return _sample_general(logits, state, batch, max_logprobs, logprobs_mode)

    return lax.cond(batch.flags != 0, general, greedy)


def count_tokens(state: SamplerState, rows: Array, tokens: Array) -> SamplerState:
    """The state with one more of ``tokens`` int32 [B] in the engine rows ``rows`` int32 [B]; in place if donated."""
    return state._replace(output_counts=state.output_counts.at[rows, tokens].add(1))


class _Rows(NamedTuple):
    """Per row [B]: what turns its logits into the distribution that it draws from."""

    max: Array
    inverse_temperature: Array
    cutoff: Array


def _sample_general(
    logits: Array, state: SamplerState, batch: SamplingBatch, max_logprobs: int, mode: LogprobsMode
) -> SampleOutput:
    wants_logprobs = batch.flags & (LOGPROBS | TOP_LOGPROBS) != 0
    nothing = partial(_no_logprobs, len(logits), max_logprobs)

    def logprobs(values: Array, tokens: Array, rows: _Rows) -> tuple[Array, Array, Array, Array]:
        return _logprobs(values, tokens, rows, batch.flags, max_logprobs)

    def chosen(values: Array) -> tuple[Array, tuple[Array, ...]]:
        tokens, rows = _tokens(values, batch)
        if mode == "raw_logprobs":
            return tokens, ()
        return tokens, lax.cond(wants_logprobs, lambda: logprobs(values, tokens, rows), nothing)

    def adjusted() -> tuple[Array, tuple[Array, ...]]:
        # Nothing is fused with what adjusts them, so that both branches do the same sums in the same order: what
        # a row gets does not depend on whether another row of its batch has a penalty.
        return chosen(lax.optimization_barrier(_adjust(logits, state, batch)))

    # Everything that reads all logits lies in the branches, twice in the program: a branch that handed on the
    # logits as they are would copy them.
    is_adjusted = batch.flags & (PENALTY | BIAS) != 0
    tokens, processed = lax.cond(is_adjusted, adjusted, lambda: chosen(logits))
    if mode == "processed_logprobs":
        return SampleOutput(tokens, *processed)

    def raw() -> tuple[Array, Array, Array, Array]:
        raw_max = sampler_choice.chunk_maxima(sampler_choice.chunked(logits)).max(axis=-1)
        rows = _Rows(raw_max, jnp.ones_like(raw_max), jnp.full_like(raw_max, -jnp.inf))
        return logprobs(logits, tokens, rows)

    return SampleOutput(tokens, *lax.cond(wants_logprobs, raw, nothing))


def _tokens(logits: Array, batch: SamplingBatch) -> tuple[Array, _Rows]:
    """A token for each row of the adjusted logits, int32 [B], and what it was drawn from."""
    chunks = sampler_choice.chunked(logits)
    maxima = sampler_choice.chunk_maxima(chunks)
    best = sampler_choice.argmax(chunks, maxima)
    rows = _distribution(logits, maxima.max(axis=-1), batch)

    def drawn() -> Array:
        seeds = lax.bitcast_convert_type(batch.ints[:, 1:3], jnp.uint32)
        noise = sampler_choice.uniforms(seeds, batch.ints[:, 3])
        token = sampler_choice.draw(chunks, *rows, noise)
        return jnp.where((batch.floats[:, 0] > 0) & (rows.max > -jnp.inf), token, best)

    return lax.cond(batch.flags & RANDOM != 0, drawn, lambda: best), rows


def _adjust(logits: Array, state: SamplerState, batch: SamplingBatch) -> Array:
    """The logits with each row's bias and penalties: float32 [B, V]."""
    repetition, presence, frequency = (batch.floats[:, column, None] for column in (3, 4, 5))
    counts = state.output_counts[batch.rows]
    biased = logits + state.logit_bias[batch.rows]
    is_seen = state.prompt_mask[batch.rows] | (counts > 0)
    # Keskar et al., "CTRL" (2019): divide what is positive, multiply what is negative.
    penalised = jnp.where(biased > 0, biased / repetition, biased * repetition)
    kept = jnp.where(is_seen, penalised, biased)
    return kept - frequency * counts.astype(jnp.float32) - presence * (counts > 0).astype(jnp.float32)


def _distribution(logits: Array, row_max: Array, batch: SamplingBatch) -> _Rows:
    """Temperature and cutoff of each row; 1 and -inf for greedy rows."""
    is_random = batch.floats[:, 0] > 0
    inverse = 1.0 / jnp.where(is_random, batch.floats[:, 0], 1.0)

    def cutoff() -> Array:
        return kept_cutoff(
            logits,
            row_max,
            inverse,
            jnp.where(is_random, batch.ints[:, 0], 0),
            jnp.where(is_random, batch.floats[:, 1], 1.0),
            jnp.where(is_random, batch.floats[:, 2], 0.0),
        )

    everything = jnp.full_like(row_max, -jnp.inf)
    return _Rows(row_max, inverse, lax.cond(batch.flags & FILTER != 0, cutoff, lambda: everything))


def _logprobs(
    logits: Array, tokens: Array, rows: _Rows, flags: Array, max_logprobs: int
) -> tuple[Array, Array, Array, Array]:
    """Log-probability and rank of ``tokens``, and the most likely tokens with theirs."""
    totals = sampler_choice.weights(sampler_choice.chunked(logits), *rows).sum(axis=(1, 2))

    def log_probability(values: Array) -> Array:  # [B, N] logits of the row
        below = jnp.where(values == rows.max[:, None], 0.0, values - rows.max[:, None])
        scaled = below * rows.inverse_temperature[:, None] - jnp.log(totals)[:, None]
        return jnp.where(values >= rows.cutoff[:, None], scaled, -jnp.inf)

    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)
    rank = (logits > chosen).sum(axis=-1, dtype=jnp.int32) + 1

    def top() -> tuple[Array, Array]:
        values, ids = lax.top_k(jnp.where(jnp.isnan(logits), -jnp.inf, logits), top_width)
        padding = ((0, 0), (0, max_logprobs - top_width))  # a vocabulary smaller than max_logprobs
        return jnp.pad(ids, padding), jnp.pad(log_probability(values), padding, constant_values=-jnp.inf)

    top_width = min(max_logprobs, logits.shape[1])
    no_top = partial(_no_top, len(tokens), max_logprobs)
    return log_probability(chosen)[:, 0], rank, *lax.cond(flags & TOP_LOGPROBS != 0, top, no_top)


def _no_logprobs(num_rows: int, max_logprobs: int) -> tuple[Array, Array, Array, Array]:
    nothing = jnp.zeros(num_rows, jnp.float32), jnp.zeros(num_rows, jnp.int32)
    return *nothing, *_no_top(num_rows, max_logprobs)


def _no_top(num_rows: int, max_logprobs: int) -> tuple[Array, Array]:
    shape = (num_rows, max_logprobs)
    return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
