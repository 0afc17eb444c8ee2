"""A tiny decoder whose next token depends on the whole context, engines over it, and what it ought to say."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpaged import AttentionVariant, Engine, RequestOutput, SamplingParams
from jaxpaged.models import Decoder, ModelConfig, split_parameters
from jaxpaged.pallas_kernels import causal_attention
from tests.text.tokenizers_made_here import byte_level

VOCAB_SIZE = 384  # more than the tokenizer has, as in many checkpoints
EOS = 1
MAX_LEN = 128

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    sliding_windows=(None, None),
    max_position_embeddings=MAX_LEN,
    eos_token_ids=(EOS,),
)

# Programs are what costs time here: nearly all tests share these shapes, five programs in all. The pool holds
# 156 tokens: any request fits alone, a few long ones together do not.
SIZES: dict[str, Any] = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 16,
    "block_size": 4,
    "num_blocks": 40,
    "max_model_len": MAX_LEN,
}

GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)


@cache
def tiny_decoder(config: ModelConfig = CONFIG, dtype: str = "float32") -> Decoder:
    """Matrices have entries of deviation 1 / sqrt(inputs), so that every layer and every key matters."""
    model = Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
    parameters, merge = split_parameters(model)
    rng = np.random.default_rng(0)
    for name, array in parameters.items():
        if array.ndim == 2:
            scale = 1.0 if name == "embedding" else array.shape[0] ** -0.5
            parameters[name] = jnp.asarray(scale * rng.standard_normal(array.shape), dtype)
        elif name.endswith("bias"):
            parameters[name] = jnp.asarray(0.5 * rng.standard_normal(array.shape), dtype)
    return merge(parameters)


def new_engine(config: ModelConfig = CONFIG, **arguments: Any) -> Engine:
    return Engine(tiny_decoder(config), **{**SIZES, "tokenizer": byte_level(), **arguments})


@cache
def shared_engine() -> Engine:
    return new_engine()


@contextlib.contextmanager
def idle(engine: Engine) -> Iterator[Engine]:
    """A shared engine as good as new, and the check that a test leaves it so."""
    engine.reset_prefix_cache()
    yield engine
    left = list(engine.block_tables())
    for name in left:  # the next test has nothing to do with them
        engine.abort_request(name)
    if engine.has_unfinished_requests:
        left += [output.request_id for output in engine.step()]
    assert left == []
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    engine.check_invariants()


def drain(engine: Engine) -> dict[str, RequestOutput]:
    """Steps until nothing is left, with all invariants checked after each; the last output of every request."""
    last = {}
    while engine.has_unfinished_requests:
        for output in engine.step():
            last[output.request_id] = output
        engine.check_invariants()
    return last


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Token ids without the special ones."""
    return np.random.default_rng([seed, length]).integers(3, VOCAB_SIZE, length).tolist()


@cache
def _forward(model: Decoder, variant: AttentionVariant | None) -> Any:
    def attend(q: Any, k: Any, v: Any, kv: Any, layer: int, own: AttentionVariant) -> tuple[jax.Array, Any]:
        merged = own if variant is None else replace(variant, sliding_window=own.sliding_window)
        return causal_attention(q, k, v, variant=merged), kv

    @jax.jit
    def forward(parameters: Any, tokens: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(merge(parameters)(tokens, attend=attend), axis=-1)

    parameters, merge = split_parameters(model)
    return lambda tokens: forward(parameters, tokens)


def dense_logprobs(
    tokens: Sequence[int], model: Decoder | None = None, variant: AttentionVariant | None = None
) -> np.ndarray:
    """Log-probabilities after each token by a forward pass over all of them, without a cache: float32 [T, V]."""
    model = model or tiny_decoder()
    # What comes after is not seen by what was before.
    padded = 128 if len(tokens) <= 128 else -(-len(tokens) // 256) * 256
    ids = np.zeros(padded, np.int32)
    ids[: len(tokens)] = tokens
    return np.asarray(_forward(model, variant)(ids))[: len(tokens)]


@cache
def _dense_greedy(prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(dense_logprobs(tokens)[-1].argmax()))
    return tuple(tokens[len(prompt) :])


def dense_greedy(prompt: Sequence[int], count: int) -> list[int]:
    """The greedy continuation, each token by a full forward pass over all before it."""
    return list(_dense_greedy(tuple(prompt), count))


def is_dense_greedy(
    prompt: Sequence[int],
    output: Sequence[int],
    model: Decoder | None = None,
    variant: AttentionVariant | None = None,
) -> bool:
    """Whether ``output`` is the greedy continuation, by one forward pass over all of it.

    The same as comparing token by token: by induction every prefix of ``output`` is right.
    """
    found = dense_logprobs([*prompt, *output[:-1]], model, variant)[len(prompt) - 1 :].argmax(axis=-1)
    return found.tolist() == list(output)


def tokens_of(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    """The token ids of each request's first completion."""
    return [output.outputs[0].token_ids for output in outputs]
