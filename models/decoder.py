"""The decoder: one flax.nnx module for all families, the same object for training and serving.

Attention is a callable argument: dense causal when training, paged when serving. Nothing here knows of
caches; ``kv`` is an opaque pytree that is threaded through the layers in order. All else treats each token by
itself and goes through a ``Rows``, which may compute the tokens tile by tile. Kernels are stored [in,
out], so that every projection is ``x @ w`` without a transpose. Shape letters: E hidden size, F
intermediate size, G query heads per key/value head; the others as in docs/architecture.md.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxpaged.models.config import ModelConfig
from jaxpaged.models.rope import apply_rope, rope_tables
from jaxpaged.models.row_tiles import Rows, all_rows
from jaxpaged.pallas_kernels import AttentionVariant
from jaxpaged.pallas_kernels.causal_attention import causal_attention

INIT_STDDEV = 0.02


class Attend(Protocol):
    """Attention over whatever memory the caller keeps: (q [..., Hq, D], k, v [..., Hkv, D]) -> [..., Hq, D]."""

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, kv: Any, layer: int, variant: AttentionVariant
    ) -> tuple[jax.Array, Any]: ...


def attend_causally(
    q: jax.Array, k: jax.Array, v: jax.Array, kv: Any, layer: int, variant: AttentionVariant
) -> tuple[jax.Array, Any]:
    """The ``Attend`` of training: dense and causal over axis -3, tokens in order, without a cache."""
    del layer
    return causal_attention(q, k, v, variant=variant), kv


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, float32 inside (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float, *, param_dtype: DTypeLike) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((size,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., size] -> [..., size], in x's dtype; rounded before the scale, as Hugging Face does."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return scale * normed.astype(x.dtype)


class Linear(nnx.Module):
    """x @ kernel [in, out] plus an optional bias [out]."""

    def __init__(
        self,
        size_in: int,
        size_out: int,
        *,
        bias: bool,
        stddev: float,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike,
    ) -> None:
        self.kernel = nnx.Param(stddev * jax.random.normal(rngs.params(), (size_in, size_out), param_dtype))
        self.bias = nnx.Param(jnp.zeros((size_out,), param_dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., out], in x's dtype."""
        y = x @ self.kernel[...].astype(x.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return y


class Attention(nnx.Module):
    """Grouped-query attention; q, k and v in one kernel.

    ``qkv`` is [E, Hkv * (G + 2) * D]: for each key/value head its G query heads, then its key, then its
    value, so that sharding the outer axis over Hkv splits heads and nothing else.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike) -> None:
        self.config = config
        width = config.num_kv_heads * (config.group_size + 2) * config.head_dim
        self.qkv = Linear(
            config.hidden_size, width,
            bias=config.attention_bias, stddev=INIT_STDDEV, rngs=rngs, param_dtype=param_dtype,
        )  # fmt: skip
        self.out = Linear(
            config.num_heads * config.head_dim, config.hidden_size,
            bias=config.attention_out_bias, stddev=_residual_stddev(config), rngs=rngs, param_dtype=param_dtype,
        )  # fmt: skip
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, param_dtype=param_dtype)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, param_dtype=param_dtype)

    def project(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [..., E] -> rotated q [..., Hq, D] and k, and v, both [..., Hkv, D]."""
        config, lead = self.config, x.shape[:-1]
        qkv = self.qkv(x).reshape(*lead, config.num_kv_heads, config.group_size + 2, config.head_dim)
        q = qkv[..., : config.group_size, :].reshape(*lead, config.num_heads, config.head_dim)
        k, v = qkv[..., -2, :], qkv[..., -1, :]
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rope(q, *rope), apply_rope(k, *rope), v

    def join(self, o: jax.Array) -> jax.Array:
        """What was attended, o [..., Hq, D] -> [..., E]."""
        return self.out(o.reshape(*o.shape[:-2], self.config.num_heads * self.config.head_dim))


class GatedMlp(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): ``down(silu(gate(x)) * up(x))``, gate and up in one kernel."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike) -> None:
        self.gate_up = Linear(
            config.hidden_size, 2 * config.intermediate_size,
            bias=config.mlp_bias, stddev=INIT_STDDEV, rngs=rngs, param_dtype=param_dtype,
        )  # fmt: skip
        self.down = Linear(
            config.intermediate_size, config.hidden_size,
            bias=config.mlp_bias, stddev=_residual_stddev(config), rngs=rngs, param_dtype=param_dtype,
        )  # fmt: skip

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., E] -> [..., E]."""
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(jax.nn.silu(gate) * up)


class DecoderLayer(nnx.Module):
    """Pre-norm residual block: attention, then the gated MLP."""

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs, param_dtype: DTypeLike) -> None:
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        self.attn = Attention(config, rngs=rngs, param_dtype=param_dtype)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        self.mlp = GatedMlp(config, rngs=rngs, param_dtype=param_dtype)
        self.layer = layer
        self.sliding_window = config.sliding_windows[layer]

    def __call__(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend, kv: Any, rows: Rows
    ) -> tuple[jax.Array, Any]:
        """x [..., E] -> [..., E] and the cache as ``attend`` returned it."""
        q, k, v = rows(self._before, x, rope)
        o, kv = attend(q, k, v, kv, self.layer, AttentionVariant(sliding_window=self.sliding_window))
        return rows(self._after, x, o), kv

    def _before(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.attn.project(self.attn_norm(x), rope)

    def _after(self, x: jax.Array, o: jax.Array) -> jax.Array:
        x = x + self.attn.join(o)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nnx.Module):
    """A decoder-only transformer of the Llama kind (Touvron et al. 2023, arXiv:2302.13971).

    ``dtype`` is that of the activations, ``param_dtype`` that of the weights; norms, rotary embeddings and
    logits are float32 in any case. Weights are drawn from ``rngs.params``: normal with deviation 0.02, and
    0.02 / sqrt(2 L) for the two projections that write to the residual stream (GPT-2).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ) -> None:
        self.config = config
        self.dtype = jnp.dtype(dtype)
        table = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(INIT_STDDEV * jax.random.normal(rngs.params(), table, param_dtype))
        self.layers = nnx.List(
            [
                DecoderLayer(config, layer, rngs=rngs, param_dtype=param_dtype)
                for layer in range(config.num_layers)
            ]
        )
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        if config.tie_word_embeddings:
            self.lm_head = None
        else:
            self.lm_head = nnx.Param(INIT_STDDEV * jax.random.normal(rngs.params(), table[::-1], param_dtype))

    def hidden(
        self, tokens: jax.Array, positions: jax.Array, attend: Attend, kv: Any = None, rows: Rows = all_rows
    ) -> tuple[jax.Array, Any]:
        """Final hidden states, after the last norm.

        ``tokens`` and ``positions`` are int32 [...] with any leading axes, of which ``rows`` may cut the first; returns
        (``dtype`` [..., E], kv).
        """
        x, rope = rows(self._embed, tokens, positions)
        for layer in self.layers:
            x, kv = layer(x, rope, attend, kv, rows)
        return rows(self.final_norm, x), kv

    def _embed(
        self, tokens: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return self.embedding[...][tokens].astype(self.dtype), rope_tables(self.config, positions)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., E] -> float32 [..., V], accumulated in float32."""
        kernel, axis = (self.embedding, 1) if self.lm_head is None else (self.lm_head, 0)
        contract = (((hidden.ndim - 1,), (axis,)), ((), ()))
        return jax.lax.dot_general(
            hidden, kernel[...].astype(hidden.dtype), contract, preferred_element_type=jnp.float32
        )

    def __call__(
        self, tokens: jax.Array, positions: jax.Array | None = None, attend: Attend | None = None
    ) -> jax.Array:
        """Logits float32 [..., T, V] of int32 tokens [..., T]; positions default to 0..T-1 in every sequence,
        ``attend`` to dense causal attention."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1], dtype=jnp.int32), tokens.shape)
        hidden, _ = self.hidden(tokens, positions, attend or attend_causally)
        return self.logits(hidden)


def _residual_stddev(config: ModelConfig) -> float:
    return INIT_STDDEV / (2 * config.num_layers) ** 0.5
