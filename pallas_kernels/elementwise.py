"""Scalar primitives as operations on whole arrays that Mosaic GPU lowers, in float32, int32 and bool.

Mosaic GPU knows fewer primitives than XLA, gets some of them wrong for our purpose, and compiles under
approximate math. Hence three groups: those it computes right are passed on, others are rewritten in terms of
them, and what is in neither is not elementwise here, so that the caller has to compute it elsewhere.

Approximate ``tanh`` has an absolute error of 2**-11, approximate ``sin`` and ``cos`` are useless for arguments
the size of a position; ``exp2``, ``log2``, ``sqrt`` and ``rsqrt`` are good to about 2**-22 (PTX ISA, "Floating
Point Instructions").
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn, Literal

_LOG2E = math.log2(math.e)


def accurate_tanh(x: jax.Array) -> jax.Array:
    """``tanh`` of float32 by ``exp2``: absolute error about 1e-7 even under approximate math."""
    return 1.0 - 2.0 / (1.0 + lax.exp2(x * (2 * _LOG2E)))


def full(value: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """A scalar of ``dtype`` as an array in the dtype that kernels hold it in; an array of ``shape`` as it is."""
    target = kernel_dtype(dtype)
    if not isinstance(value, jax.Array):
        value = np.asarray(value, dtype).astype(target)
        return lax.full(shape, value[()], target) if value.shape == () else jnp.asarray(value)
    return value.astype(target) if value.shape == shape else jnp.broadcast_to(value.astype(target), shape)


def dtype_of(atom: Any) -> Any:
    """The dtype of a variable or literal of a trace."""
    return atom.aval.dtype


def kernel_dtype(dtype: Any) -> np.dtype:
    """The dtype in which a kernel holds values of ``dtype``: bool, int32 or float32."""
    for kind, held in ((jnp.bool_, jnp.bool_), (jnp.integer, jnp.int32), (jnp.floating, jnp.float32)):
        if jnp.issubdtype(dtype, kind):
            return np.dtype(held)
    raise NotImplementedError(f"Mosaic GPU kernels have no values of dtype {dtype}")


def _logistic(x: jax.Array) -> jax.Array:
    return 1.0 / (1.0 + lax.exp2(x * -_LOG2E))


def _log1p(x: jax.Array) -> jax.Array:
    # log(1 + x) = 2 artanh(x / (2 + x)), as a series where the sum would round x away.
    z = x / (2.0 + x)
    square = z * z
    series = 2.0 * z * (1.0 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9)))))
    return lax.select(lax.abs(x) < 0.25, series, lax.log(1.0 + x))


def _expm1(x: jax.Array) -> jax.Array:
    series = lax.full(x.shape, 1.0, x.dtype)
    for divisor in range(7, 1, -1):
        series = 1.0 + series * x * (1 / divisor)
    return lax.select(lax.abs(x) < 0.25, x * series, lax.exp(x) - 1.0)


def _erfc_of_positive(x: jax.Array) -> jax.Array:
    # Abramowitz and Stegun 1964, 7.1.26: absolute error 1.5e-7. Mosaic GPU has no layout rule for erf.
    t = 1.0 / (1.0 + 0.3275911 * x)
    series = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
    return t * (0.254829592 + t * (-0.284496736 + t * series)) * lax.exp(-x * x)


def _erfc(x: jax.Array) -> jax.Array:
    tail = _erfc_of_positive(lax.abs(x))
    return lax.select(x < 0, 2.0 - tail, tail)


def _floor(x: jax.Array) -> jax.Array:
    whole = x.astype(jnp.int32).astype(jnp.float32)
    # From 2**23 on every float32 is whole; infinity and NaN stay as well.
    return lax.select(lax.abs(x) < 2.0**23, whole - _convert(whole > x, jnp.float32), x)


def _sign(x: jax.Array) -> jax.Array:
    one = lax.full(x.shape, 1, x.dtype)
    return lax.select(x > 0, one, lax.select(x < 0, -one, x))


def _not(x: jax.Array) -> jax.Array:
    return lax.bitwise_xor(x, lax.full(x.shape, True if x.dtype == jnp.bool_ else -1, x.dtype))


def _convert(x: jax.Array, dtype: Any) -> jax.Array:
    target = kernel_dtype(dtype)
    if target == jnp.bool_:
        return x if x.dtype == jnp.bool_ else x != 0  # Mosaic GPU would take the lowest bit
    if x.dtype == jnp.bool_:
        return lax.select(x, lax.full(x.shape, 1, target), lax.full(x.shape, 0, target))
    return lax.convert_element_type(x, target)


def _select_n(which: jax.Array, *cases: jax.Array) -> jax.Array:
    if which.dtype == jnp.bool_:
        return lax.select_n(which, *cases)
    out = cases[0]
    for number, case in enumerate(cases[1:], 1):
        out = lax.select(which >= number, case, out)
    return out


def _over_ints(operation: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """For bools as well, which Mosaic GPU does not order."""

    def apply(*args: jax.Array) -> jax.Array:
        if args[0].dtype != bool:
            return operation(*args)
        out = operation(*(_convert(x, jnp.int32) for x in args))
        return _convert(out, jnp.bool_)

    return apply


def _div(x: jax.Array, y: jax.Array) -> jax.Array:
    if x.dtype == jnp.float32:
        return lax.div(x, y)
    zero = y == 0  # -1 for XLA, anything at all for LLVM
    return lax.select(
        zero, lax.full(x.shape, -1, x.dtype), lax.div(x, lax.select(zero, lax.full_like(y, 1), y))
    )


def _rem(x: jax.Array, y: jax.Array) -> jax.Array:
    zero = y == 0
    return lax.select(zero, x, lax.rem(x, lax.select(zero, lax.full_like(y, 1), y)))


def _shift(operation: Callable[..., jax.Array], is_arithmetic: bool) -> Callable[..., jax.Array]:
    """Shifts by any amount, as XLA defines them; those by more than the width are undefined in LLVM."""

    def apply(x: jax.Array, by: jax.Array) -> jax.Array:
        inside = (by >= 0) & (by < 32)
        if is_arithmetic:
            return operation(x, lax.select(inside, by, lax.full_like(by, 31)))
        return lax.select(inside, operation(x, by & 31), lax.full_like(x, 0))

    return apply


def _integer_pow(x: jax.Array, y: int) -> jax.Array:
    out = lax.full(x.shape, 1, x.dtype)
    for bit in f"{abs(y):b}":
        out = out * out
        out = out * x if bit == "1" else out
    return out if y >= 0 else 1.0 / out


def _pow(x: jax.Array, y: jax.Array, base: float | None, exponent: float | None) -> jax.Array:
    """Powers of which one side is known, and the base positive if it is that one."""
    if base is not None:
        return lax.exp2(_convert(y, jnp.float32) * math.log2(base))
    assert exponent is not None
    if exponent == int(exponent):
        return _integer_pow(x, int(exponent))
    if abs(exponent) == 0.5:
        return lax.sqrt(x) if exponent > 0 else lax.rsqrt(x)
    return lax.exp2(lax.log(x) * (exponent * _LOG2E))


# On scalars, and inside a kernel. pvary and pcast mark values that differ between the devices of a shard_map.
_IDENTITIES = (
    *("broadcast_in_dim", "copy", "copy_p", "optimization_barrier"),
    *("pcast", "pvary", "reshape", "squeeze", "stop_gradient"),
)

# What is computed right by Mosaic GPU, or by these in terms of that.
_OPERATIONS: dict[str, Callable[..., jax.Array]] = {
    **{name: getattr(lax, name) for name in ("abs", "add", "exp", "exp2", "log", "log2", "mul", "neg")},
    **{name: getattr(lax, name) for name in ("sub", "sqrt", "rsqrt")},
    **{name: _over_ints(getattr(lax, name)) for name in ("eq", "ne", "lt", "le", "gt", "ge", "max", "min")},
    **{name: getattr(lax, f"bitwise_{name}") for name in ("and", "or", "xor")},
    **dict.fromkeys(_IDENTITIES, lambda x: x),
    "ceil": lambda x: -_floor(-x),
    "clamp": lambda low, x, high: lax.min(lax.max(x, low), high),
    "div": _div,
    "erf": lambda x: 1.0 - _erfc(x),
    "erfc": _erfc,
    "expm1": _expm1,
    "floor": _floor,
    "is_finite": lambda x: lax.abs(x) < math.inf,
    "log1p": _log1p,
    "logistic": _logistic,
    "not": _not,
    "one_minus_square": lambda x: (1.0 + x) * (1.0 - x),
    "rem": _rem,
    "select_n": _select_n,
    "shift_left": _shift(lax.shift_left, False),
    "shift_right_arithmetic": _shift(lax.shift_right_arithmetic, True),
    "shift_right_logical": _shift(lax.shift_right_logical, False),
    "sign": _sign,
    "square": lambda x: x * x,
    "tanh": accurate_tanh,
}
# Those that need parameters of the equation.
_WITH_PARAMETERS = ("convert_element_type", "integer_pow", "pow", "round")

# What is the same when integers of fewer bits, or unsigned ones of 32 bits, are held as int32.
_PRESERVING = {*_IDENTITIES, "and", "or", "xor", "eq", "ne", "select_n"}
_OF_NARROW = _PRESERVING | {"lt", "le", "gt", "ge", "max", "min", "clamp", "convert_element_type"}
_OF_UNSIGNED = _PRESERVING | {"add", "sub", "mul", "neg", "not", "shift_left", "shift_right_logical"}


def is_elementwise(equation: JaxprEqn) -> bool:
    """Whether a kernel can compute this equation of a trace of scalars, with the same result."""
    name = equation.primitive.name
    atoms: list[Any] = [*equation.invars, *equation.outvars]
    if len(equation.outvars) != 1 or (name not in _OPERATIONS and name not in _WITH_PARAMETERS):
        return False
    if any(getattr(v.aval, "shape", None) != () or _kind(dtype_of(v)) == "other" for v in atoms):
        return False
    if name == "convert_element_type":
        return _converts(dtype_of(equation.invars[0]), dtype_of(equation.outvars[0]))
    kinds = {_kind(dtype_of(v)) for v in atoms}
    if name == "rem" and "float" in kinds:  # Mosaic GPU's is inexact when the quotient is large
        return False
    if name == "pow":
        base, exponent = (_literal(v) for v in equation.invars)
        if exponent is not None:
            return math.isfinite(exponent)
        return base is not None and 0 < base < math.inf
    return ("narrow" not in kinds or name in _OF_NARROW) and ("unsigned" not in kinds or name in _OF_UNSIGNED)


def emit(equation: JaxprEqn, args: Sequence[jax.Array]) -> jax.Array:
    """Computes an elementwise equation on arrays of one shape, in the dtypes of ``kernel_dtype``."""
    name, params = equation.primitive.name, equation.params
    match name:
        case "convert_element_type":
            return _convert(args[0], params["new_dtype"])
        case "integer_pow":
            return _integer_pow(args[0], params["y"])
        case "pow":
            base, exponent = (_literal(v) for v in equation.invars)
            return _pow(args[0], args[1], base, exponent)
        case "round":
            return lax.round(args[0], params["rounding_method"])
    return _OPERATIONS[name](*args)


def _literal(atom: Any) -> float | None:
    return float(np.asarray(atom.val)) if isinstance(atom, Literal) else None


def _kind(dtype: Any) -> str:
    if dtype == jnp.bool_:
        return "bool"
    if jnp.issubdtype(dtype, jnp.floating):
        return "float"
    if not jnp.issubdtype(dtype, jnp.integer):
        return "other"
    if jnp.iinfo(dtype).bits < 32:
        return "narrow"
    return "unsigned" if jnp.issubdtype(dtype, jnp.unsignedinteger) else "int"


def _converts(source: Any, target: Any) -> bool:
    """Whether a conversion is one of int32 and float32 as well."""
    kinds = _kind(source), _kind(target)
    if kinds[1] == "narrow":
        return kinds[0] == "bool" or (kinds[0] == "narrow" and np.can_cast(source, target))
    if kinds[0] == "unsigned":
        return kinds[1] in ("int", "unsigned", "bool")
    return kinds != ("float", "unsigned")
