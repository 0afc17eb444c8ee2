"""What runs on the device: the program of a bucket, for one step or for several decode steps in a row.

A program takes the weights, the engine's device state, one packed buffer and the arrays of a user's attention variant.
It writes the step's keys and values, attends, and samples; the state comes back changed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxpaged.batch import PackedLayout, StepInputs, unpack
from jaxpaged.kv_layout import KVLayout
from jaxpaged.models import Decoder, Parameters
from jaxpaged.models.row_tiles import Rows, RowTiles, all_rows
from jaxpaged.pallas_kernels import (
    AttentionBatch,
    AttentionVariant,
    KVPool,
    MixedKVPool,
    cache_scatter,
    paged_attention,
)
from jaxpaged.pallas_kernels.variant import VariantSpec
from jaxpaged.sampler import LogprobsMode, SampleOutput, SamplerState, SamplingBatch, choose, count_tokens

LOGPROB_CHUNK = 256  # prompt positions whose logits exist at one time


Pool: TypeAlias = KVPool | MixedKVPool


class DeviceState(NamedTuple):
    """Everything that a step changes.

    tokens: int32 ``[R]``, the token that each engine row sampled last, for a step that was built before the host
    knew it.
    """

    pool: Pool
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
      row_tile: None computes the rows of a step together. Otherwise a row's bits do not depend on the batch: attention
        is a deterministic one, and all else goes in tiles of this many rows.
      skip_padding: leave out tiles of nothing but padding. Not for a GPU, where the host would have to wait for
        the number of rows in each of the loops.
    """

    merge: Callable[[Parameters], Decoder]
    layout: KVLayout
    variant: VariantSpec | None
    attention: str | None
    max_logprobs: int
    logprobs_mode: LogprobsMode
    row_tile: int | None = None
    skip_padding: bool = False

    @property
    def compiler_options(self) -> dict[str, str | bool]:
        """What XLA has to be told when it compiles these programs."""
        if self.row_tile is None or self.skip_padding:
            return {}
        # XLA knows how many tiles there are, and would put a single one in the place of its loop. Its products would
        # then be fused with other things than in a step of two tiles, and could get another kernel.
        return {
            "xla_disable_hlo_passes": "simplify-while-loops",
            "xla_gpu_cublas_fallback": False,
        }

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
        if self.row_tile is None:
            rows: Rows = RowTiles(min(LOGPROB_CHUNK, layout.num_tokens))
        else:
            rows = self._rows(inputs.attention[0].query_start_loc[-1])
        return StepOutput(sampled, _prompt_logprobs(model, hidden, inputs, self.max_logprobs, rows)), state

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
        user = self.user_variant(operands)

        def attend(
            q: jax.Array, k: jax.Array, v: jax.Array, kv: Any, layer: int, variant: AttentionVariant
        ) -> tuple[jax.Array, Any]:
            group, place = self.layout.places[layer]
            batch = inputs.attention[group]
            # All keys of the step first: its rows may share blocks.
            pool = cache_scatter(kv, k, v, place, batch.slots)
            return self.attend(q, pool, layer, batch, variant, user), pool

        attention = inputs.attention[0]
        rows = self._rows(attention.query_start_loc[-1])
        hidden, pool = model.hidden(inputs.token_ids, attention.positions, attend, state.pool, rows)
        sampled = self._sample(model, hidden[inputs.sample_at], state.sampler, inputs)
        sampler = count_tokens(state.sampler, inputs.sampling.rows, sampled.tokens)
        tokens = state.tokens.at[inputs.token_rows].set(sampled.tokens)
        return hidden, sampled, DeviceState(pool, sampler, tokens)

    def user_variant(self, operands: tuple[jax.Array, ...]) -> AttentionVariant | None:
        """The user's attention variant over its arrays."""
        return None if self.variant is None else self.variant.bind(operands)

    def attend(
        self,
        q: jax.Array,
        pool: Pool,
        layer: int,
        batch: AttentionBatch,
        own: AttentionVariant,
        user: AttentionVariant | None,
    ) -> jax.Array:
        """Paged attention of a layer of the model; ``batch`` is that of its group, ``own`` its variant."""
        return paged_attention(
            q,
            pool,
            self.layout.places[layer][1],
            batch,
            variant=_merged(own, user),
            implementation=self.attention,
            deterministic=self.row_tile is not None,
        )

    def _sample(
        self, model: Decoder, hidden: jax.Array, state: SamplerState, inputs: StepInputs
    ) -> SampleOutput:
        """A token for each row, of hidden states ``[B, E]``."""
        batch, starts = inputs.sampling, inputs.attention[0].query_start_loc

        def pick(hidden: jax.Array, rows: jax.Array, floats: jax.Array, ints: jax.Array) -> SampleOutput:
            return choose(
                model.logits(hidden),
                state,
                SamplingBatch(rows, floats, ints, batch.flags),
                max_logprobs=self.max_logprobs,
                logprobs_mode=self.logprobs_mode,
            )

        rows = self._rows((starts[1:] > starts[:-1]).sum(dtype=jnp.int32))
        return rows(pick, hidden, batch.rows, batch.floats, batch.ints)

    def _rows(self, num_rows: jax.Array) -> Rows:
        """How to compute rows of which the first ``num_rows`` are real."""
        if self.row_tile is None:
            return all_rows
        return RowTiles(self.row_tile, num_rows if self.skip_padding else None)


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
    model: Decoder, hidden: jax.Array, inputs: StepInputs, max_logprobs: int, rows: Rows
) -> PromptLogprobs:
    """Log-probabilities of the prompt's own tokens, as many at a time as ``rows`` says; zeros when nobody asks."""
    num_tokens = hidden.shape[0]

    def some(hidden: jax.Array, next_token_ids: jax.Array) -> PromptLogprobs:
        logprobs = jax.nn.log_softmax(model.logits(hidden), axis=-1)
        own = jnp.take_along_axis(logprobs, next_token_ids[:, None], axis=1)
        rank = (logprobs > own).sum(axis=1, dtype=jnp.int32) + 1
        top, ids = lax.top_k(logprobs, max_logprobs)
        return PromptLogprobs(own[:, 0], rank, ids.astype(jnp.int32), top)

    def all_of_them() -> PromptLogprobs:
        return rows(some, hidden, inputs.next_token_ids)

    def nothing() -> PromptLogprobs:
        f32, i32 = jnp.float32, jnp.int32
        top = (num_tokens, max_logprobs)
        return PromptLogprobs(
            jnp.zeros(num_tokens, f32), jnp.zeros(num_tokens, i32), jnp.zeros(top, i32), jnp.zeros(top, f32)
        )

    return lax.cond(inputs.wants_prompt_logprobs, all_of_them, nothing)
