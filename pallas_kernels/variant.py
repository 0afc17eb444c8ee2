"""Attention variants: what may change between query, key and softmax, for every implementation alike.

A variant is data plus two scalar JAX functions. Every implementation traces the same two functions into
its inner loop, so ALiBi, soft-capping, document or tree masks are a few lines and never a kernel fork::

    slopes = jnp.exp2(-8.0 * (jnp.arange(num_heads) + 1) / num_heads)
    alibi = AttentionVariant(score_mod=lambda score, row, head, q_pos, kv_pos:
                             score - slopes[head] * (q_pos - kv_pos))

The idea of scalar ``score_mod`` / ``mask_mod`` functions is FlexAttention's (Dong et al. 2024,
arXiv:2412.05496); here ``row`` is the index of the sequence in the batch and positions are absolute.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

ScoreMod: TypeAlias = Callable[[Any, Any, Any, Any, Any], Any]
MaskMod: TypeAlias = Callable[[Any, Any, Any, Any], Any]

# Large and finite: a row whose keys are all masked stays free of NaN, and exp() of it is exactly zero.
MASKED = -1e30


@dataclass(frozen=True, eq=False)
class AttentionVariant:
    """What attention computes beyond ``softmax(q k^T / sqrt(D)) v``, causal in absolute positions.

    Attributes:
      scale: factor of the scores; ``None`` is ``D ** -0.5``.
      logit_soft_cap: ``c`` in ``c * tanh(score / c)``, applied to the scaled score (Gemma 2).
      sliding_window: a query sees only the last ``sliding_window`` positions, its own included (Mistral).
      sinks: float ``[Hq]``, one extra logit a head that takes part in the softmax and has no value (gpt-oss).
      score_mod: ``(score, row, head, q_pos, kv_pos) -> score``, float32 and int32 scalars, after the cap.
      mask_mod: ``(row, head, q_pos, kv_pos) -> bool``; False hides a key that is visible otherwise.

    The functions may close over arrays. ``split`` tells these from the static structure, so that new
    array values never lead to a new compilation. (Arrays that only a function jitted inside of a mod closes
    over count as structure.)

    Raises:
      ValueError: a field is out of its range; the message names it and its value.
    """

    scale: float | None = None
    logit_soft_cap: float | None = None
    sliding_window: int | None = None
    sinks: jax.Array | None = None
    score_mod: ScoreMod | None = None
    mask_mod: MaskMod | None = None

    def __post_init__(self) -> None:
        for name in ("scale", "logit_soft_cap"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value, Real) and math.isfinite(value) and value > 0):
                raise ValueError(f"AttentionVariant: {name}={value!r} must be a positive finite number")
        window: object = self.sliding_window
        if window is not None and not (_is_number(window, Integral) and window > 0):  # type: ignore[operator]
            raise ValueError(f"AttentionVariant: sliding_window={window!r} must be a positive integer")
        for name in ("score_mod", "mask_mod"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise ValueError(f"AttentionVariant: {name}={value!r} must be a function")

    @property
    def has_mods(self) -> bool:
        """Whether a user's function takes part."""
        return self.score_mod is not None or self.mask_mod is not None

    def scale_for(self, head_dim: int) -> float:
        """The factor of the scores for a head of ``head_dim``."""
        return head_dim**-0.5 if self.scale is None else self.scale

    def split(self) -> "tuple[VariantSpec, tuple[jax.Array, ...]]":
        """The static structure (hashable, compares by value) and the arrays the variant closes over."""
        operands: list[jax.Array] = []
        mods = []
        for mod, takes_score in ((self.score_mod, True), (self.mask_mod, False)):
            traced = None
            if mod is not None:
                traced, consts = _trace(mod, takes_score)
                operands += consts
            mods.append(traced)
        if self.sinks is not None:
            operands.append(jnp.asarray(self.sinks, jnp.float32))
        spec = VariantSpec(
            self.scale, self.logit_soft_cap, self.sliding_window, self.sinks is not None, mods[0], mods[1]
        )
        return spec, tuple(operands)


def _is_number(value: object, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


class TracedMod:
    """A traced user function. Two compare equal when their traces read the same, arrays left open.

    A trace holds the arrays that jitted functions inside of it close over, and does not print them: they are
    compared by value, else a variant would silently run with the arrays of another one.
    """

    def __init__(self, closed_jaxpr: Any) -> None:
        self.jaxpr = closed_jaxpr.jaxpr
        self.num_consts = len(closed_jaxpr.consts)
        self._key = (str(self.jaxpr), tuple(_inner_arrays(self.jaxpr)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TracedMod) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def bind(self, consts: tuple[jax.Array, ...]) -> Callable[..., Any]:
        """The function again, over these arrays."""

        def mod(*args: Any) -> Any:
            avals = [v.aval for v in self.jaxpr.invars]
            scalars = [jnp.asarray(a, v.dtype) for a, v in zip(args, avals, strict=True)]
            return jax.core.eval_jaxpr(self.jaxpr, consts, *scalars)[0]

        return mod


def _inner_arrays(jaxpr: Any) -> Iterator[tuple[Any, ...]]:
    """Shape, dtype and digest of the arrays that the traces inside of ``jaxpr`` carry, in order."""
    for equation in jaxpr.eqns:
        for leaf in jax.tree.leaves(tuple(equation.params.values())):
            inner = getattr(leaf, "jaxpr", leaf)
            if not hasattr(inner, "eqns"):
                continue
            for const in getattr(leaf, "consts", ()):
                array = np.asarray(const)
                yield array.shape, str(array.dtype), hashlib.sha256(array.tobytes()).digest()
            yield from _inner_arrays(inner)


@dataclass(frozen=True)
class VariantSpec:
    """The static part of an ``AttentionVariant``: a key for compiled programs."""

    scale: float | None
    logit_soft_cap: float | None
    sliding_window: int | None
    has_sinks: bool
    score_mod: TracedMod | None
    mask_mod: TracedMod | None

    def bind(self, operands: tuple[jax.Array, ...]) -> AttentionVariant:
        """The variant again, over ``operands`` in the order in which ``split`` gave them."""
        rest = list(operands)
        functions: list[Callable[..., Any] | None] = []
        for traced in (self.score_mod, self.mask_mod):
            if traced is None:
                functions.append(None)
                continue
            consts, rest = tuple(rest[: traced.num_consts]), rest[traced.num_consts :]
            functions.append(traced.bind(consts))
        sinks = rest.pop(0) if self.has_sinks else None
        return AttentionVariant(
            self.scale, self.logit_soft_cap, self.sliding_window, sinks, functions[0], functions[1]
        )


def _trace(mod: Callable[..., Any], takes_score: bool) -> tuple[TracedMod, list[jax.Array]]:
    index = jax.ShapeDtypeStruct((), jnp.int32)
    args = [jax.ShapeDtypeStruct((), jnp.float32)] * takes_score + [index] * 4
    closed = jax.make_jaxpr(mod)(*args)
    shapes = [v.shape for v in closed.out_avals]
    if shapes != [()]:
        name = "score_mod" if takes_score else "mask_mod"
        raise ValueError(f"AttentionVariant: {name} must return one scalar, it returned shapes {shapes}")
    return TracedMod(closed), [jnp.asarray(c) for c in closed.consts]


def modify_scores(
    variant: AttentionVariant, scores: Any, row: Any, head: Any, q_pos: Any, kv_pos: Any
) -> tuple[Any, Any]:
    """Applies soft cap and ``score_mod``, and tells which keys are visible.

    Args:
      variant: the variant.
      scores: float32, already scaled, any shape.
      row, head, q_pos, kv_pos: int32 arrays of the rank of ``scores`` that broadcast to its shape.

    Returns:
      The new scores (float32), and a bool array that broadcasts to them: causal, window and ``mask_mod``.
    """
    if variant.logit_soft_cap is not None:
        scores = variant.logit_soft_cap * jnp.tanh(scores / variant.logit_soft_cap)
    if variant.score_mod is not None:
        scores = jnp.vectorize(variant.score_mod)(scores, row, head, q_pos, kv_pos).astype(jnp.float32)
    visible = kv_pos <= q_pos
    if variant.sliding_window is not None:
        visible &= kv_pos > q_pos - variant.sliding_window
    if variant.mask_mod is not None:
        visible = visible & jnp.vectorize(variant.mask_mod)(row, head, q_pos, kv_pos)
    return scores, visible
