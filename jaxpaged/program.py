"""What runs on the device: the program of a bucket, for one step or for several decode steps in a row.

A program takes the weights, the engine's device state, one packed buffer and the arrays of a user's attention variant.
It writes the step's keys and values, attends, and samples; the state comes back changed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpaged.batch import PackedLayout, StepInputs, unpack
from jaxpaged.kv_layout import KVLayout
from jaxpaged.models import Decoder, Parameters
from jaxpaged.pallas_kernels import AttentionBatch, AttentionVariant, KVPool, cache_scatter, paged_attention
from jaxpaged.pallas_kernels.variant import VariantSpec
from jaxpaged.sampler import LogprobsMode, SampleOutput, SamplerState, sample

LOGPROB_CHUNK = 256  # prompt positions whose logits exist at one time


class DeviceState(NamedTuple):
    """Everything that a step changes.

    tokens: int32 ``[R]``, the token that each engine row sampled last, for a step that was built before the host
    knew it.
    """

    pool: KVPool
    sampler: SamplerState
    tokens: jax.Array


class PromptLogprobs(NamedTuple):
    """Of the token that follows each position.

    logprob float32 and rank int32 ``[T]``; top_ids and top_logprobs, the most likely, ``[T, max_logprobs]``.
    """

    logprob: jax.Array
    rank: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


class StepOutput(NamedTuple):
    """What a step hands back to the host, as device arrays."""

    sampled: SampleOutput
    prompt: PromptLogprobs


@dataclass(frozen=True)
class Programs:
    """The programs of one engine: what they share, and the functions to compile.

    Attributes:
      merge: parameters to module (``models.split_parameters``).
      layout: the groups of layers that share block tables.
      variant: the user's attention variant, laid over the model's own, or None.
      attention: implementation of paged attention, or None for the best.
      max_logprobs, logprobs_mode: see ``jaxpaged.sampler``.
    """

    merge: Callable[[Parameters], Decoder]
    layout: KVLayout
    variant: VariantSpec | None
    attention: str | None
    max_logprobs: int
    logprobs_mode: LogprobsMode

    def step(
        self,
        weights: Parameters,
        state: DeviceState,
        buffer: jax.Array,
        operands: tuple[jax.Array, ...],
        *,
        layout: PackedLayout,
    ) -> tuple[StepOutput, DeviceState]:
        """One step: any mix of prompt chunks and decode rows."""
        inputs = _with_device_tokens(unpack(buffer, layout), state.tokens)
        model = self.merge(weights)
        hidden, sampled, state = self._forward(model, state, inputs, operands)
        return StepOutput(sampled, _prompt_logprobs(model, hidden, inputs, self.max_logprobs)), state

    def decode_steps(
        self,
        weights: Parameters,
        state: DeviceState,
        buffer: jax.Array,
        operands: tuple[jax.Array, ...],
        *,
        layout: PackedLayout,
        num_steps: int,
    ) -> tuple[jax.Array, DeviceState]:
        """``num_steps`` steps of decode rows, the token of one feeding the next; tokens int32 ``[num_steps, B]``.

        Token ``i`` of the buffer is row ``i``, and the block tables have room for all steps.
        """
        first = _with_device_tokens(unpack(buffer, layout), state.tokens)
        model = self.merge(weights)
        block_size = state.pool.block_size

        def one(
            carry: tuple[DeviceState, jax.Array], index: jax.Array
        ) -> tuple[tuple[DeviceState, jax.Array], jax.Array]:
            state, token_ids = carry
            inputs = _advanced(first, token_ids, index, block_size)
            _, sampled, state = self._forward(model, state, inputs, operands)
            return (state, sampled.tokens), sampled.tokens

        steps = jnp.arange(num_steps, dtype=jnp.int32)
        (state, _), tokens = lax.scan(one, (state, first.token_ids), steps)
        return tokens, state

    def _forward(
        self, model: Decoder, state: DeviceState, inputs: StepInputs, operands: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, SampleOutput, DeviceState]:
        user = None if self.variant is None else self.variant.bind(operands)

        def attend(
            q: jax.Array, k: jax.Array, v: jax.Array, kv: KVPool, layer: int, variant: AttentionVariant
        ) -> tuple[jax.Array, KVPool]:
            group, place = self.layout.places[layer]
            batch = inputs.attention[group]
            # All keys of the step first: its rows may share blocks.
            pool = cache_scatter(kv, k, v, place, batch.slots)
            merged = _merged(variant, user)
            out = paged_attention(q, pool, place, batch, variant=merged, implementation=self.attention)
            return out, pool

        hidden, pool = model.hidden(inputs.token_ids, inputs.attention[0].positions, attend, state.pool)
        sampled, sampler = sample(
            model.logits(hidden[inputs.sample_at]),
            state.sampler,
            inputs.sampling,
            max_logprobs=self.max_logprobs,
            logprobs_mode=self.logprobs_mode,
        )
        tokens = state.tokens.at[inputs.token_rows].set(sampled.tokens)
        return hidden, sampled, DeviceState(pool, sampler, tokens)


def _with_device_tokens(inputs: StepInputs, tokens: jax.Array) -> StepInputs:
    """The inputs with the tokens in place that the host did not know."""
    ids = inputs.token_ids
    return replace(inputs, token_ids=jnp.where(ids < 0, tokens[-jnp.minimum(ids, 0)], ids))


def _advanced(first: StepInputs, token_ids: jax.Array, steps: jax.Array, block_size: int) -> StepInputs:
    """The inputs of decode rows ``steps`` steps after ``first``; padding rows stay where they are."""
    ints = first.sampling.ints.at[:, 3].add(steps)
    return replace(
        first,
        token_ids=token_ids,
        attention=tuple(_advanced_attention(old, steps, block_size) for old in first.attention),
        sampling=first.sampling._replace(ints=ints),
    )


def _advanced_attention(old: AttentionBatch, steps: jax.Array, block_size: int) -> AttentionBatch:
    real = jnp.arange(len(old.positions)) < old.query_start_loc[-1]
    positions = jnp.where(real, old.positions + steps, 0)
    blocks = jnp.take_along_axis(old.block_tables, (positions // block_size)[:, None], axis=1)[:, 0]
    return replace(
        old,
        positions=positions,
        slots=jnp.where(real, blocks * block_size + positions % block_size, 0),
        seq_lens=jnp.where(real, old.seq_lens + steps, 0),
    )


def _merged(own: AttentionVariant, user: AttentionVariant | None) -> AttentionVariant:
    """The model's variant with the user's fields over it."""
    if user is None:
        return own
    names = ("scale", "logit_soft_cap", "sliding_window", "sinks", "score_mod", "mask_mod")
    chosen = {n: getattr(own if getattr(user, n) is None else user, n) for n in names}
    return AttentionVariant(**chosen)


def _prompt_logprobs(
    model: Decoder, hidden: jax.Array, inputs: StepInputs, max_logprobs: int
) -> PromptLogprobs:
    """Log-probabilities of the prompt's own tokens, chunk by chunk; zeros when nobody asks."""
    num_tokens = hidden.shape[0]
    chunk = min(LOGPROB_CHUNK, num_tokens)
    pad = -num_tokens % chunk

    def one_chunk(part: tuple[jax.Array, jax.Array]) -> PromptLogprobs:
        logprobs = jax.nn.log_softmax(model.logits(part[0]), axis=-1)
        own = jnp.take_along_axis(logprobs, part[1][:, None], axis=1)
        rank = (logprobs > own).sum(axis=1, dtype=jnp.int32) + 1
        top, ids = lax.top_k(logprobs, max_logprobs)
        return PromptLogprobs(own[:, 0], rank, ids.astype(jnp.int32), top)

    def all_chunks() -> PromptLogprobs:
        parts = (
            jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, chunk, hidden.shape[1]),
            jnp.pad(inputs.next_token_ids, (0, pad)).reshape(-1, chunk),
        )
        done = lax.map(one_chunk, parts)
        return PromptLogprobs(*(x.reshape(-1, *x.shape[2:])[:num_tokens] for x in done))

    def nothing() -> PromptLogprobs:
        f32, i32 = jnp.float32, jnp.int32
        top = (num_tokens, max_logprobs)
        return PromptLogprobs(
            jnp.zeros(num_tokens, f32), jnp.zeros(num_tokens, i32), jnp.zeros(top, i32), jnp.zeros(top, f32)
        )

    return lax.cond(inputs.wants_prompt_logprobs, all_chunks, nothing)
