"""Paged attention as JAX differentiates it: the forward pass of any implementation, the gradient of ``gradient``."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxpaged.pallas_kernels.batch import AttentionBatch, KVPool
from jaxpaged.pallas_kernels.cache_scatter import cache_scatter
from jaxpaged.pallas_kernels.paged_attention.gradient import Gradients, Problem, attention_gradient
from jaxpaged.pallas_kernels.variant import AttentionVariant, VariantSpec


@dataclass(frozen=True)
class _Call:
    """What is static in a call."""

    forward: Callable[[jax.Array, KVPool, int, AttentionBatch, AttentionVariant], jax.Array]
    layer: int
    spec: VariantSpec


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Asked:
    """Which of the variant's arrays are differentiated; part of what the forward pass leaves for the backward one."""

    operands: tuple[bool, ...]


def attend(
    forward: Callable[[jax.Array, KVPool, int, AttentionBatch, AttentionVariant], jax.Array],
    q: jax.Array,
    kv_pool: KVPool,
    layer: int,
    batch: AttentionBatch,
    variant: AttentionVariant,
) -> jax.Array:
    """``forward`` of the other arguments, differentiable in ``q`` and the variant's arrays."""
    spec, operands = variant.split()
    return _attend(_Call(forward, layer, spec), q, kv_pool, batch, operands)


def scatter_and_attend(
    forward: Callable[[jax.Array, KVPool, int, AttentionBatch, AttentionVariant], jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pool: KVPool,
    layer: int,
    batch: AttentionBatch,
    variant: AttentionVariant,
) -> tuple[jax.Array, KVPool]:
    """``cache_scatter``, then ``forward``; differentiable in ``q``, ``k``, ``v`` and the variant's arrays."""
    spec, operands = variant.split()
    return _scatter_and_attend(_Call(forward, layer, spec), q, k, v, kv_pool, batch, operands)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    call: _Call, q: jax.Array, kv_pool: KVPool, batch: AttentionBatch, operands: tuple[jax.Array, ...]
) -> jax.Array:
    return call.forward(q, kv_pool, call.layer, batch, call.spec.bind(operands))


def _attend_forward(call: _Call, *arguments: Any) -> tuple[Any, Any]:
    q, kv_pool, batch, operands = _values(arguments)
    if any(leaf.perturbed for leaf in jax.tree.leaves(arguments[1])):
        raise NotImplementedError(
            "paged_attention: no gradient with respect to kv_pool, it would be as large as the pool. "
            "paged_attention_step takes the keys and values of the step and is differentiable in them; where the pool "
            "is a constant, pass jax.lax.stop_gradient(kv_pool)"
        )
    out = _attend(call, q, kv_pool, batch, operands)
    return out, (q, out, kv_pool, batch, operands, _asked(arguments[3]))


def _attend_backward(call: _Call, saved: Any, out_gradient: Any) -> tuple[Any, ...]:
    q, out, kv_pool, batch, operands, asked = saved
    if isinstance(out_gradient, SymbolicZero):
        return None, None, None, None
    problem = Problem(q, out, out_gradient, kv_pool, call.layer, batch, call.spec, operands)
    found = _once_differentiable(problem, own_keys=False, wanted=asked.operands)
    return found.q.astype(q.dtype), None, None, _operand_gradients(found, operands)


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scatter_and_attend(
    call: _Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pool: KVPool,
    batch: AttentionBatch,
    operands: tuple[jax.Array, ...],
) -> tuple[jax.Array, KVPool]:
    pool = cache_scatter(kv_pool, k, v, call.layer, batch.slots)
    return call.forward(q, pool, call.layer, batch, call.spec.bind(operands)), pool


def _scatter_and_attend_forward(call: _Call, *arguments: Any) -> tuple[Any, Any]:
    q, k, v, kv_pool, batch, operands = _values(arguments)
    out, pool = _scatter_and_attend(call, q, k, v, kv_pool, batch, operands)
    # The rows' blocks and not the pool: the next layer writes to that, and XLA would have to keep both. It has to read
    # the blocks before anybody writes, or it would copy the pool to read them late, in the backward pass.
    blocks = _blocks_of_rows(pool, call.layer, batch)
    pool, out, blocks = jax.lax.optimization_barrier((pool, out, blocks))
    like = jnp.zeros((), k.dtype), jnp.zeros((), v.dtype)
    return (out, pool), (q, out, blocks, like, batch, operands, _asked(arguments[5]))


def _scatter_and_attend_backward(call: _Call, saved: Any, gradients: tuple[Any, Any]) -> tuple[Any, ...]:
    q, out, blocks, (k, v), batch, operands, asked = saved
    # That of the pool is dropped: what is in a pool is a constant to whoever reads it later.
    out_gradient = gradients[0]
    if isinstance(out_gradient, SymbolicZero):
        return (None,) * 6
    tables = jnp.arange(batch.block_tables.size, dtype=jnp.int32).reshape(batch.block_tables.shape)
    of_blocks = replace(batch, block_tables=tables)
    problem = Problem(q, out, out_gradient, blocks, 0, of_blocks, call.spec, operands)
    found = _once_differentiable(problem, own_keys=True, wanted=asked.operands)
    assert found.k is not None
    assert found.v is not None
    dq, dk, dv = found.q.astype(q.dtype), found.k.astype(k.dtype), found.v.astype(v.dtype)
    return dq, dk, dv, None, None, _operand_gradients(found, operands)


_scatter_and_attend.defvjp(_scatter_and_attend_forward, _scatter_and_attend_backward, symbolic_zeros=True)


def _values(arguments: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.value, arguments)


def _asked(operands: Any) -> _Asked:
    return _Asked(tuple(x.perturbed and jnp.issubdtype(x.value.dtype, jnp.floating) for x in operands))


def _blocks_of_rows(kv_pool: KVPool, layer: int, batch: AttentionBatch) -> KVPool:
    """A pool of one layer with the blocks of the rows' tables, row by row: ``[B*M, Hkv, S, ...]``."""
    entries = (batch.block_tables + layer * kv_pool.num_blocks).reshape(-1)
    taken = jax.tree.map(lambda x: x.at[entries].get(mode="promise_in_bounds"), kv_pool)
    return replace(taken, num_layers=1)


def _operand_gradients(found: Gradients, operands: tuple[jax.Array, ...]) -> tuple[jax.Array | None, ...]:
    pairs = zip(found.operands, operands, strict=True)
    return tuple(None if x is None else x.astype(operand.dtype) for x, operand in pairs)


def _once_differentiable(problem: Problem, *, own_keys: bool, wanted: tuple[bool, ...]) -> Gradients:
    """``attention_gradient``, which says so when somebody asks for its derivative."""
    layer, spec = problem.layer, problem.spec

    @jax.custom_jvp
    def gradient(arrays: Any) -> Gradients:
        q, out, out_gradient, kv_pool, batch, operands = arrays
        again = Problem(q, out, out_gradient, kv_pool, layer, batch, spec, operands)
        return attention_gradient(again, own_keys=own_keys, wanted=wanted)

    @gradient.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError("paged_attention: it has a gradient, and no second derivatives")

    return gradient(
        (problem.q, problem.out, problem.out_gradient, problem.kv_pool, problem.batch, problem.operands)
    )
