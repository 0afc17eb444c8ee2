"""Splits a user's scalar function into values that XLA computes and an elementwise rest that a kernel inlines.

A Mosaic GPU kernel can neither close over arrays nor index them by tiles of positions. So every part of a
``score_mod`` or ``mask_mod`` that touches an array is hoisted out of the kernel: XLA evaluates it, over only
those of row, head and positions on which it depends. ``doc[q_pos] == doc[kv_pos]`` becomes two vectors that the
kernel compares, ``slopes[head] * (q_pos - kv_pos)`` a vector over heads, ``table[head, q_pos - kv_pos]`` a tile.
The kernel loads these, broadcasts them to its tile of scores and inlines the rest there.

The functions are FlexAttention's (Dong et al. 2024, arXiv:2412.05496), which leaves the gathers to its kernel
instead, because Triton can do them. What the kernel computes is in ``elementwise.py``.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jax.typing import ArrayLike

from jaxpaged.pallas_kernels.elementwise import (
    accurate_tanh,
    dtype_of,
    emit,
    full,
    is_elementwise,
    kernel_dtype,
)

__all__ = ["AXES", "Hoisted", "SplitMod", "accurate_tanh", "split_mod"]

AXES = ("row", "head", "q_pos", "kv_pos")
_SCORE = "score"

# Calls of another trace, by the names of their primitives. Derivatives that are given with them play no part.
_CALLS = (
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "checkpoint",
    "remat2",
    "custom_jvp_call",
    "custom_vjp_call",
)
_CONTROL_FLOW = ("cond", "scan", "while")


@dataclass(frozen=True, eq=False)
class Hoisted:
    """A value that is computed outside of the kernel. It may hold tracers: use it in the trace that made it.

    Attributes:
      axes: what it depends on, a part of ``AXES`` in that order; nothing for a single scalar.
      dtype: as the kernel gets it: float32, or int32 for integers and bools.
    """

    axes: tuple[str, ...]
    dtype: np.dtype
    _value: Callable[..., Any] = field(repr=False)

    def evaluate(
        self, row: ArrayLike | None, head: ArrayLike | None, q_pos: ArrayLike | None, kv_pos: ArrayLike | None
    ) -> jax.Array:
        """The value at these indices: int32, of any ranks that broadcast; those not in ``axes`` are ignored.

        Returns:
          An array of ``dtype``, in the shape that the indices in ``axes`` broadcast to.
        """
        given = zip(AXES, (row, head, q_pos, kv_pos), strict=True)
        indices = [jnp.asarray(index, jnp.int32) for axis, index in given if axis in self.axes]
        rank = max((index.ndim for index in indices), default=0)
        indices = [index.reshape((1,) * (rank - index.ndim) + index.shape) for index in indices]
        # vectorize maps a sub-expression only over those dimensions that it depends on.
        return jnp.asarray(jnp.vectorize(self._value)(*indices) if indices else self._value())


@dataclass(frozen=True, eq=False)
class SplitMod:
    """A user's function, cut in two.

    Attributes:
      hoisted: what the kernel has to be given, without duplicates.
    """

    hoisted: tuple[Hoisted, ...]
    _takes_score: bool
    _jaxpr: Jaxpr = field(repr=False)
    _leaves: tuple[Var, ...] = field(repr=False)
    _equations: tuple[JaxprEqn, ...] = field(repr=False)

    def inline(
        self, loaded: Sequence[Any], score: Any, row: Any, head: Any, q_pos: Any, kv_pos: Any
    ) -> jax.Array:
        """The function on whole arrays, by elementwise operations that Mosaic GPU lowers.

        Args:
          loaded: the values of ``hoisted``, in that order.
          score: float32; None for a mask_mod.
          row, head, q_pos, kv_pos: int32.

        All of them are scalars or have one common shape.

        Returns:
          The new scores (float32), or the mask (bool), of the common shape.
        """
        arguments = [score] * self._takes_score + [row, head, q_pos, kv_pos]
        shape = jnp.broadcast_shapes(*(jnp.shape(x) for x in (*arguments, *loaded)))
        [result] = self._jaxpr.outvars
        used = _variables([result, *(v for equation in self._equations for v in equation.invars)])
        env: dict[Any, Any] = {}
        for variable, value in zip(self._jaxpr.invars, arguments, strict=True):
            if variable in used:
                env[variable] = full(value, shape, dtype_of(variable))
        for variable, hoisted, value in zip(self._leaves, self.hoisted, loaded, strict=True):
            value = full(value, shape, hoisted.dtype)
            env[variable] = value != 0 if dtype_of(variable) == jnp.bool_ else value

        def read(atom: Any) -> Any:
            return full(atom.val, shape, dtype_of(atom)) if isinstance(atom, Literal) else env[atom]

        for equation in self._equations:
            env[equation.outvars[0]] = emit(equation, [read(v) for v in equation.invars])
        return read(result)


def split_mod(mod: Callable[..., Any], takes_score: bool) -> SplitMod:
    """Splits ``mod``, a score_mod if ``takes_score`` and a mask_mod if not.

    Raises:
      NotImplementedError: the score goes where only hoisted values can: into array operations, loops, or
        primitives that Mosaic GPU has no elementwise form of; the message names the primitive.
      ValueError: ``mod`` does not return one scalar.
    """
    closed = _flatten(mod, takes_score)
    jaxpr = closed.jaxpr
    axes = _dependencies(jaxpr, takes_score)
    equations, leaves = _cut(jaxpr, axes, ())
    equations, leaves = _cut(jaxpr, axes, _absorbing(jaxpr, axes, equations, leaves))
    hoisted = [_hoist(closed, takes_score, v, axes[v]) for v in leaves]
    return SplitMod(tuple(hoisted), takes_score, jaxpr, tuple(leaves), tuple(equations))


def _flatten(mod: Callable[..., Any], takes_score: bool) -> Any:
    """The trace of ``mod`` without inner calls, that returns float32 for a score and bool for a mask."""
    index = jax.ShapeDtypeStruct((), jnp.int32)
    args = [jax.ShapeDtypeStruct((), jnp.float32)] * takes_score + [index] * 4
    closed = jax.make_jaxpr(mod)(*args)
    shapes = [v.shape for v in closed.out_avals]
    if shapes != [()]:
        raise ValueError(f"split_mod: mod must return one scalar, it returned shapes {shapes}")

    def flat(*args: Any) -> Any:
        [out] = _evaluate_flat(closed.jaxpr, closed.consts, args, {})
        return jnp.asarray(out).astype(jnp.float32 if takes_score else jnp.bool_)

    return jax.make_jaxpr(flat)(*args)


def _evaluate_flat(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], known: dict[Any, Any]
) -> list[Any]:
    """Evaluates a trace, inner calls inlined, equal expressions once.

    ``known`` has the results by primitive, arguments and parameters, and keeps the arguments alive by whose
    identity it knows them. A cond becomes a selection between its branches, as it does under vmap.
    """
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        values = [read(v) for v in equation.invars]
        if name in _CALLS:
            inner = params.get("jaxpr", params.get("call_jaxpr"))
            inner_consts = getattr(inner, "consts", ())
            outputs = _evaluate_flat(getattr(inner, "jaxpr", inner), inner_consts, values, known)
        elif name == "cond" and not any(v.aval.shape for v in equation.outvars):
            index, *operands = values
            first, *others = [_evaluate_flat(b.jaxpr, b.consts, operands, known) for b in params["branches"]]
            outputs = first
            for number, branch in enumerate(others, 1):
                chosen = lax.ge(index, np.int32(number))
                outputs = [lax.select_n(chosen, x, y) for x, y in zip(outputs, branch, strict=True)]
        else:
            key = _key(equation, values)
            if key not in known:
                known[key] = values, _bind(equation, values)
            outputs = known[key][1]
        env.update(zip(equation.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _bind(equation: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    primitive = equation.primitive
    outputs = primitive.bind(*values, **primitive.get_bind_params(equation.params))
    return list(outputs) if primitive.multiple_results else [outputs]


def _key(equation: JaxprEqn, values: Sequence[Any]) -> Any:
    """Equal for equations that compute the same thing. Two that are not told apart safely differ."""
    operands = [
        (str(dtype_of(v)), repr(np.asarray(v.val).item())) if isinstance(v, Literal) else id(x)
        for v, x in zip(equation.invars, values, strict=True)
    ]
    key = (equation.primitive, tuple(operands), tuple(sorted(equation.params.items())))
    try:
        hash(key)
    except TypeError:
        return id(equation)
    return id(equation) if equation.effects else key


def _variables(atoms: Iterable[Any]) -> set[Var]:
    return {v for v in atoms if isinstance(v, Var)}


def _dependencies(jaxpr: Jaxpr, takes_score: bool) -> dict[Var, tuple[str, ...]]:
    """On which arguments each variable depends, in their order."""
    names = (_SCORE,) * takes_score + AXES
    found: dict[Var, tuple[str, ...]] = dict.fromkeys(jaxpr.constvars, ())
    found.update((v, (name,)) for v, name in zip(jaxpr.invars, names, strict=True))
    for equation in jaxpr.eqns:
        sources = {name for v in _variables(equation.invars) for name in found[v]}
        found.update((v, tuple(name for name in names if name in sources)) for v in equation.outvars)
    return found


def _cut(
    jaxpr: Jaxpr, axes: dict[Var, tuple[str, ...]], hoist: Collection[Var]
) -> tuple[list[JaxprEqn], list[Var]]:
    """What the kernel computes, and what it is given: from the result back to array operations and ``hoist``."""
    needed = _variables(jaxpr.outvars)
    inlined: list[JaxprEqn] = []
    leaves: list[Var] = []
    refused = None
    for equation in reversed(jaxpr.eqns):
        outputs = [v for v in equation.outvars if v in needed]
        if outputs and is_elementwise(equation) and outputs[0] not in hoist:
            inlined.append(equation)
            needed |= _variables(equation.invars)
            continue
        if any(_SCORE in axes[v] for v in outputs):
            refused = equation  # the first of a chain is the one to name
            needed |= _variables(equation.invars)
        leaves += reversed(outputs)
    if refused is not None:
        raise NotImplementedError(_refusal(refused))
    leaves += [v for v in reversed(jaxpr.constvars) if v in needed]
    return inlined[::-1], leaves[::-1]


def _absorbing(
    jaxpr: Jaxpr, axes: dict[Var, tuple[str, ...]], equations: Sequence[JaxprEqn], leaves: Sequence[Var]
) -> set[Var]:
    """Inlined variables that had better be hoisted, because a hoisted value goes into nothing else.

    Over the same axes, the variable takes that value's place: ``1 / temperature``, or a table's entry that is
    compared. The kernel loads no more than before, and computes less.
    """
    uses = Counter(v for equation in equations for v in _variables(equation.invars))
    hoisted = set(leaves)
    for equation in equations:
        [out] = equation.outvars
        inputs = _variables(equation.invars)
        if any(v in hoisted and uses[v] == 1 and axes[v] == axes[out] for v in inputs):
            hoisted.add(out)
    return hoisted


def _refusal(equation: JaxprEqn) -> str:
    name = equation.primitive.name
    avals = [v.aval for v in (*equation.invars, *equation.outvars)]
    if name in _CONTROL_FLOW:
        return f"score_mod: control flow may not depend on the score, and {name} does"
    if any(getattr(aval, "shape", ()) for aval in avals):
        return f"score_mod: array indexing may not depend on the score, and {name} does"
    dtypes = ", ".join(str(dtype_of(v)) for v in equation.invars)
    return f"score_mod: {name} of {dtypes} may not depend on the score: Mosaic GPU kernels cannot compute it"


def _hoist(closed: Any, takes_score: bool, variable: Var, axes: tuple[str, ...]) -> Hoisted:
    jaxpr, dtype = closed.jaxpr, kernel_dtype(dtype_of(variable))
    dtype = np.dtype(jnp.int32) if dtype == jnp.bool_ else dtype
    needed = {variable}
    slice_: list[JaxprEqn] = []
    for equation in reversed(jaxpr.eqns):
        if not needed.isdisjoint(equation.outvars):
            slice_.insert(0, equation)
            needed |= _variables(equation.invars)
    arguments = dict(zip(AXES, jaxpr.invars[takes_score:], strict=True))
    constants = {v: c for v, c in zip(jaxpr.constvars, closed.consts, strict=True) if v in needed}

    def value(*indices: Any) -> Any:
        env: dict[Any, Any] = dict(constants)
        env.update((arguments[axis], index) for axis, index in zip(axes, indices, strict=True))
        for equation in slice_:
            values = [v.val if isinstance(v, Literal) else env[v] for v in equation.invars]
            env.update(zip(equation.outvars, _bind(equation, values), strict=True))
        return jnp.asarray(env[variable]).astype(dtype)

    return Hoisted(axes, dtype, value)
