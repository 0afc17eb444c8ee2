"""Vector inner loops of the CPU kernel, written as LLVM IR because no vectoriser finds these shapes.

All are on vectors of ``LANES`` float32, one AVX-512 register; LLVM splits them on narrower machines. Sixteen keys
are scored at a time: one accumulator a key over the head dimension, and then the sixteen vectors
are summed across lanes together in a tree of fifteen shuffle-and-add steps, which ends with
one vector of sixteen scores. A horizontal sum for each key would cost more than its products.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VEC, _INTS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_LOG2E = 1.4426950408889634
# 2**f on [0, 1), highest power first.
_EXP2 = (
    2.1612947513e-4, 1.2467835782e-3, 9.6754528907e-3, 5.5485279853e-2, 2.4022930575e-1, 6.9314704442e-1, 1.0,
)  # fmt: skip
_ZEROS = ir.Constant(_VEC, [0.0] * LANES)


def array_data(context: Any, builder: Any, array_type: Any, value: Any) -> Any:
    """Pointer to an array's first element."""
    return context.make_array(array_type)(context, builder, value).data


def _load(builder: Any, pointer: Any, offset: Any) -> Any:
    return builder.load(builder.bitcast(builder.gep(pointer, [offset]), _VEC.as_pointer()), align=4)


def _store(builder: Any, value: Any, pointer: Any, offset: Any) -> None:
    builder.store(value, builder.bitcast(builder.gep(pointer, [offset]), _VEC.as_pointer()), align=4)


def _constant(value: float) -> Any:
    # A float32 constant must be spelled as a float32.
    return ir.Constant(_VEC, [float(np.float32(value))] * LANES)


def _splat(builder: Any, scalar: Any) -> Any:
    nothing = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    return builder.shuffle_vector(
        builder.insert_element(nothing, scalar, _I32(0)), nothing, _mask([0] * LANES)
    )


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))


def _mask(lanes: list[int]) -> Any:
    return ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)


def loop(builder: Any, start: Any, stop: Any, step: int, initial: list[Any], body: Any) -> list[Any]:
    """``for i in range(start, stop, step)`` that carries values; ``body(i, values)`` returns the new ones."""
    before = builder.block
    head = builder.append_basic_block("head")
    inside = builder.append_basic_block("inside")
    after = builder.append_basic_block("after")
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(_I64)
    index.add_incoming(start, before)
    carried = [builder.phi(value.type) for value in initial]
    for phi, value in zip(carried, initial, strict=True):
        phi.add_incoming(value, before)
    builder.cbranch(builder.icmp_signed("<", index, stop), inside, after)
    builder.position_at_end(inside)
    results = body(index, carried)
    index.add_incoming(builder.add(index, _I64(step)), builder.block)
    for phi, value in zip(carried, results, strict=True):
        phi.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return carried


def _sum_lanes(builder: Any, vectors: list[Any]) -> Any:
    """Sixteen vectors to the vector of their sums, in order.

    Each level joins vectors that are ``distance`` apart: lanes with a clear bit of ``distance`` are kept from the
    first, those with it set from the second, and in each the partner lane is added.
    """
    distance = LANES // 2
    while len(vectors) > 1:
        low = [lane if not lane & distance else lane ^ distance ^ LANES for lane in range(LANES)]
        high = [lane ^ distance if not lane & distance else lane ^ LANES for lane in range(LANES)]
        half = len(vectors) // 2
        vectors = [
            builder.fadd(
                builder.shuffle_vector(vectors[i], vectors[i + half], _mask(low)),
                builder.shuffle_vector(vectors[i], vectors[i + half], _mask(high)),
            )
            for i in range(half)
        ]
        distance //= 2
    return vectors[0]


def _reduce(builder: Any, operation: str, arguments: list[Any]) -> Any:
    """``llvm.vector.reduce.*`` of a vector, in any order of additions."""
    kind = ir.FunctionType(_F32, [argument.type for argument in arguments])
    name = f"llvm.vector.reduce.{operation}.v{LANES}f32"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, arguments, fastmath=("reassoc", "nsz"))


def _within(builder: Any, start: Any, lo: Any, hi: Any) -> Any:
    """Which of the lanes ``start ..`` lie in ``[lo, hi)``."""
    lanes = builder.add(_splat(builder, start), ir.Constant(_INTS, list(range(LANES))))
    return builder.and_(
        builder.icmp_signed(">=", lanes, _splat(builder, lo)),
        builder.icmp_signed("<", lanes, _splat(builder, hi)),
    )


@intrinsic
def max_of(typing: Any, scores: Any, at: Any, lo: Any, hi: Any, top: Any) -> Any:
    """The largest of ``top`` and ``scores[lo:hi]``; float32 scores begin at flat offset ``at``.

    Whole vectors are read: there must be room up to the next multiple of 16 after ``hi``.
    """
    del typing, at, lo, hi, top

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = array_data(context, builder, signature.args[0], args[0])
        lo, hi = (builder.trunc(args[i], _I32) for i in (2, 3))
        best = _splat(builder, args[4])

        def body(j: Any, carried: list[Any]) -> list[Any]:
            value = _load(builder, data, builder.add(args[1], j))
            inside = _within(builder, builder.trunc(j, _I32), lo, hi)
            larger = builder.and_(inside, builder.fcmp_ordered(">", value, carried[0]))
            return [builder.select(larger, value, carried[0])]

        first = builder.and_(args[2], _I64(-LANES))
        (best,) = loop(builder, first, args[3], LANES, [best], body)
        return _reduce(builder, "fmax", [best])

    index = types.int64
    return types.float32(scores, index, index, index, types.float32), codegen


@intrinsic
def exp_sum(typing: Any, scores: Any, at: Any, lo: Any, hi: Any, top: Any) -> Any:
    """``scores[lo:hi] = exp(scores[lo:hi] - top)`` in place; returns their sum. ``top`` is none smaller than any.

    Other elements of the vectors touched become zero. ``exp(x) = 2**w * 2**f`` with ``w + f = x / log(2)``: the
    first factor is an exponent field, the second a minimax polynomial on [0, 1) with relative error 2e-9, so
    that float32 rounding dominates. The subtraction comes first: large scores keep their low bits.
    """
    del typing, at, lo, hi, top

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = array_data(context, builder, signature.args[0], args[0])
        lo, hi = (builder.trunc(args[i], _I32) for i in (2, 3))
        top = _splat(builder, args[4])
        kind = ir.FunctionType(_VEC, [_VEC])
        floor = cgutils.get_or_insert_function(builder.module, kind, f"llvm.floor.v{LANES}f32")

        def body(j: Any, carried: list[Any]) -> list[Any]:
            place = builder.add(args[1], j)
            inside = _within(builder, builder.trunc(j, _I32), lo, hi)
            x = builder.fmul(builder.fsub(_load(builder, data, place), top), _constant(_LOG2E))
            # Below 2**-126 there is no normal float; those weights are as good as zero.
            x = builder.select(builder.fcmp_ordered("<", x, _constant(-126.0)), _constant(-126.0), x)
            whole = builder.call(floor, [x])
            fraction = builder.fsub(x, whole)
            power = _constant(_EXP2[0])
            for coefficient in _EXP2[1:]:
                power = _fma(builder, power, fraction, _constant(coefficient))
            exponent = builder.add(builder.fptosi(whole, _INTS), ir.Constant(_INTS, [127] * LANES))
            scale = builder.bitcast(builder.shl(exponent, ir.Constant(_INTS, [23] * LANES)), _VEC)
            weight = builder.select(inside, builder.fmul(power, scale), _ZEROS)
            _store(builder, weight, data, place)
            return [builder.fadd(carried[0], weight)]

        first = builder.and_(args[2], _I64(-LANES))
        (total,) = loop(builder, first, args[3], LANES, [_ZEROS], body)
        return _reduce(builder, "fadd", [_F32(0.0), total])

    index = types.int64
    return types.float32(scores, index, index, index, types.float32), codegen


@intrinsic
def score_keys(
    typing: Any, query: Any, query_at: Any, keys: Any, keys_at: Any, scores: Any, scores_at: Any, head_dim: Any,
    scale: Any,
) -> Any:  # fmt: skip
    """``scores[0:16] = scale * keys[0:16] @ query``: query ``[D]``, keys ``[16, D]``, D a multiple of 16.

    The arrays are contiguous float32 of any rank; ``*_at`` are flat offsets into them. (Slicing instead would cost
    an atomic reference count each.)
    """
    del typing

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        q, k, out = (array_data(context, builder, signature.args[i], args[i]) for i in (0, 2, 4))
        size = args[6]
        rows = [builder.add(args[3], builder.mul(_I64(i), size)) for i in range(LANES)]

        def body(d: Any, sums: list[Any]) -> list[Any]:
            part = _load(builder, q, builder.add(args[1], d))
            return [
                _fma(builder, part, _load(builder, k, builder.add(row, d)), total)
                for row, total in zip(rows, sums, strict=True)
            ]

        sums = loop(builder, _I64(0), size, LANES, [_ZEROS] * LANES, body)
        total = _sum_lanes(builder, sums)
        _store(builder, builder.fmul(total, _splat(builder, args[7])), out, args[5])
        return context.get_dummy_value()

    at = types.int64
    return types.void(query, at, keys, at, scores, at, at, types.float32), codegen


@intrinsic
def add_values(
    typing: Any, out: Any, out_at: Any, weights: Any, weights_at: Any, values: Any, values_at: Any, num_keys: Any,
    head_dim: Any,
) -> Any:  # fmt: skip
    """``out += weights @ values``: out ``[D]``, weights ``[num_keys]``, values ``[num_keys, D]``, ``num_keys >= 0``.

    Arrays and offsets as in ``score_keys``.
    """
    del typing

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        acc, w, v = (array_data(context, builder, signature.args[i], args[i]) for i in (0, 2, 4))
        count, size = args[6], args[7]
        even = builder.and_(count, _I64(-2))

        def add_key(key: Any, d: Any, sums: list[Any]) -> list[Any]:
            weight = _splat(builder, builder.load(builder.gep(w, [builder.add(args[3], key)])))
            at = builder.add(args[5], builder.add(builder.mul(key, size), d))
            return [
                _fma(builder, weight, _load(builder, v, builder.add(at, _I64(i * LANES))), total)
                for i, total in enumerate(sums)
            ]

        def columns(width: int) -> Any:
            """Adds ``width`` vectors of the head dimension; two keys at a time, for independent chains."""

            def body(d: Any, _: list[Any]) -> list[Any]:
                places = [builder.add(args[1], builder.add(d, _I64(i * LANES))) for i in range(width)]
                sums = [_load(builder, acc, place) for place in places]

                def two_keys(key: Any, carried: list[Any]) -> list[Any]:
                    first = add_key(key, d, carried[:width])
                    return first + add_key(builder.add(key, _I64(1)), d, carried[width:])

                both = loop(builder, _I64(0), even, 2, sums + [_ZEROS] * width, two_keys)
                sums = [builder.fadd(a, b) for a, b in zip(both[:width], both[width:], strict=True)]
                sums = loop(builder, even, count, 1, sums, lambda key, carried: add_key(key, d, carried))
                for place, total in zip(places, sums, strict=True):
                    _store(builder, total, acc, place)
                return []

            return body

        wide = builder.sub(size, builder.srem(size, _I64(4 * LANES)))
        loop(builder, _I64(0), wide, 4 * LANES, [], columns(4))
        loop(builder, wide, size, LANES, [], columns(1))
        return context.get_dummy_value()

    at = types.int64
    return types.void(out, at, weights, at, values, at, at, at), codegen
