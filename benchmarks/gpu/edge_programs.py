"""The edges of a decoder layer, each between the matrix products around it, and sampling: what to compile.

An edge is what lies between two products. XLA fuses some of it into them (a residual that a product's epilogue adds,
the scale of a norm that the next product's prologue applies, the sum over the parts of a product that was split), so
that an edge is only right to look at together with its products, taken from the model's own modules. Their weights are
left out of all counts. Each edge comes in two forms: as XLA makes it, and with a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.gpu.lost_kernels import residual_norm
from jaxpaged.models import ModelConfig
from jaxpaged.models.decoder import DecoderLayer
from jaxpaged.models.rope import rope_tables
from jaxpaged.pallas_kernels import KVPool, cache_scatter
from jaxpaged.pallas_kernels.rope_scatter import rope_scatter
from jaxpaged.sampler import SamplingBatch, choose, init_sampler_state
from jaxpaged.sampler_cutoff import kept_cutoff

BLOCK_SIZE = 16
NUM_BLOCKS = 4096
DTYPE = jnp.bfloat16
MAX_LOGPROBS = 20

# One layer of the size of an 8B model of the Llama 3 family.
MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=1,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    sliding_windows=(None,),
    max_position_embeddings=8192,
)


class Edge(NamedTuple):
    """A program and its abstract arguments; weights come first, and ``donated`` says what is updated in place."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    donated: tuple[int, ...] = ()


def abstract(*shape: int, dtype: Any = DTYPE) -> Any:
    """An array that is only a shape."""
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def layer_parts() -> tuple[Any, Any]:
    """The graph and the abstract weights of one layer."""
    make = lambda: DecoderLayer(MODEL, 0, rngs=nnx.Rngs(0), param_dtype=DTYPE)  # noqa: E731
    return nnx.split(nnx.eval_shape(make))


def pool_shape() -> KVPool:
    """An abstract pool of one layer."""
    array = abstract(NUM_BLOCKS, MODEL.num_kv_heads, BLOCK_SIZE, MODEL.head_dim)
    return KVPool(array, array, 1)


def rope_scatter_xla(num_tokens: int) -> Edge:
    """Projection to q, k and v, rotation by XLA, scatter kernel: to rotated q and the pool."""
    graph, weights = layer_parts()

    def program(weights: Any, pool: KVPool, x: jax.Array, positions: jax.Array, slots: jax.Array) -> Any:
        layer = nnx.merge(graph, weights)
        q, k, v = layer.attn.project(x, rope_tables(MODEL, positions))
        return q, cache_scatter(pool, k, v, 0, slots, implementation="mosaic_gpu")

    return Edge(program, (weights, pool_shape(), *_tokens(num_tokens)), (1,))


def rope_scatter_kernel(num_tokens: int) -> Edge:
    """The same with one kernel for rotation and scatter."""
    graph, weights = layer_parts()

    def program(weights: Any, pool: KVPool, x: jax.Array, positions: jax.Array, slots: jax.Array) -> Any:
        layer = nnx.merge(graph, weights)
        shape = (num_tokens, MODEL.num_kv_heads, MODEL.group_size + 2, MODEL.head_dim)
        cos, sin = (table[:, 0] for table in rope_tables(MODEL, positions))
        qkv = layer.attn.qkv(x).reshape(shape)
        return rope_scatter(qkv, cos, sin, pool, 0, slots, implementation="mosaic_gpu")

    return Edge(program, (weights, pool_shape(), *_tokens(num_tokens)), (1,))


def residual_norm_xla(num_tokens: int) -> Edge:
    """Output projection, residual, norm, gate and up: to the residual stream and gate_up."""
    graph, weights = layer_parts()

    def program(weights: Any, x: jax.Array, o: jax.Array) -> Any:
        layer = nnx.merge(graph, weights)
        x = x + layer.attn.out(o)
        return x, layer.mlp.gate_up(layer.mlp_norm(x))

    return Edge(program, (weights, *[abstract(num_tokens, MODEL.hidden_size)] * 2))


def residual_norm_kernel(num_tokens: int) -> Edge:
    """The same with one kernel for residual and norm."""
    graph, weights = layer_parts()

    def program(weights: Any, x: jax.Array, o: jax.Array) -> Any:
        layer = nnx.merge(graph, weights)
        norm = layer.mlp_norm
        x, normed = residual_norm(x, layer.attn.out(o), norm.scale[...], norm.eps)
        return x, layer.mlp.gate_up(normed)

    return Edge(program, (weights, *[abstract(num_tokens, MODEL.hidden_size)] * 2))


def swiglu_xla(num_tokens: int) -> Edge:
    """The gated MLP."""
    graph, weights = layer_parts()

    def program(weights: Any, x: jax.Array) -> Any:
        return nnx.merge(graph, weights).mlp(x)

    return Edge(program, (weights, abstract(num_tokens, MODEL.hidden_size)))


def sampling_xla(num_rows: int) -> Edge:
    """Tokens from logits, for every mix of parameters."""
    vocab_size = MODEL.vocab_size
    state = jax.eval_shape(lambda: init_sampler_state(num_rows + 1, vocab_size))
    batch = SamplingBatch(
        abstract(num_rows, dtype="int32"),
        abstract(num_rows, 6, dtype="float32"),
        abstract(num_rows, 4, dtype="int32"),
        abstract(dtype="int32"),
    )

    def program(logits: jax.Array, state: Any, batch: SamplingBatch) -> Any:
        return choose(logits, state, batch, max_logprobs=MAX_LOGPROBS)

    return Edge(program, (abstract(num_rows, vocab_size, dtype="float32"), state, batch))


def cutoff(num_rows: int, implementation: str) -> Edge:
    """The search for what top-k, top-p and min-p keep of each row."""
    of_row = abstract(num_rows, dtype="float32")
    program = partial(kept_cutoff, implementation=implementation)
    logits, top_k = abstract(num_rows, MODEL.vocab_size, dtype="float32"), abstract(num_rows, dtype="int32")
    return Edge(program, (logits, of_row, of_row, top_k, of_row, of_row))


def _tokens(num_tokens: int) -> tuple[Any, ...]:
    of_token = abstract(num_tokens, dtype="int32")
    return abstract(num_tokens, MODEL.hidden_size), of_token, of_token
