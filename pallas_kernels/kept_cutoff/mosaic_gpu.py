"""The least logit that top-k, top-p and min-p keep, as one Mosaic GPU kernel: each row's search stays on its chip.

Grid: ``(rows,)``; a thread block is one warpgroup. XLA hands over, from one pass over the logits, the largest logit
and the largest weight of every chunk of ``CHUNK`` tokens. A chunk whose largest value does not reach the lower bound
of a search never counts in it, so that few chunks take part where the distribution is peaked:

1. A bound: the k-th largest of the chunks' maxima, which the k-th largest logit reaches; for top-p alone the
   weight under which all tokens together weigh less than ``1 - top_p``; for min-p itself.
2. The chunks that reach it are copied to shared memory, as many as fit. Those after the first that did not fit are
   read again at each step of a search, if they reach its threshold.
3. The searches of ``jaxpaged.sampler_cutoff``, with the same thresholds in the same order: bisection over the
   order-preserving integer image of float32, halving images and values in turn.

Numerics: counts are exact. Weights are added chunk after chunk, so that a sum differs from XLA's in its rounding.
Weights are ``exp2`` of the hardware, within 2**-22; a token is kept or not by its weight here alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpaged.pallas_kernels.mosaic_gpu import (
    INTERPRETED,
    GpuTarget,
    gpu_target,
    kernel,
    store_global,
    unsupported_device_reason,
)

CHUNK = 256
GROUP = 8  # chunks that are loaded together, so that their latencies overlap
_RESERVED_SMEM = 4096  # of a thread block, for what is not chunks
_TINY = float(jnp.finfo(jnp.float32).tiny)
_SLACK = 1.0 - 2.0**-12  # far more than two ways of computing a weight differ by

Measure = Callable[[Any], Any]


def kept_cutoff_mosaic_gpu(
    logits: jax.Array,
    row_max: jax.Array,
    inverse_temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    *,
    capacity: int | None = None,
    interpret: Any = None,
    target: GpuTarget | None = None,
) -> jax.Array:
    """Arguments and result as in ``jaxpaged.sampler_cutoff.kept_cutoff``.

    Args:
      capacity: chunks that shared memory holds; None for as many as fit. A multiple of 8.
      interpret: a ``plgpu.InterpretGPUParams`` to run in the interpreter, for tests.
      target: the GPU to trace for, if not the default device.

    Raises:
      NotImplementedError: the device is not supported, or the vocabulary is no multiple of ``CHUNK``.
    """
    target = target or (gpu_target() if interpret is None else INTERPRETED)
    vocab_size = logits.shape[1]
    reason = unsupported_device_reason(target)
    if vocab_size % CHUNK or vocab_size < GROUP * CHUNK:
        reason = f"vocab_size={vocab_size} is no multiple of {CHUNK}, or less than {GROUP * CHUNK}"
    if reason or target is None:
        raise NotImplementedError(f"kept_cutoff: implementation='mosaic_gpu': {reason}")
    num_chunks = vocab_size // CHUNK
    capacity = min(capacity or capacity_of(target), -(-num_chunks // GROUP) * GROUP)
    chunks = logits.reshape(-1, num_chunks, CHUNK)
    maxima = jnp.where(jnp.isnan(chunks), -jnp.inf, chunks).max(axis=-1)
    # A whole number of groups, and a length that 128 threads share evenly; what is added never counts.
    padding = ((0, 0), (0, -num_chunks % 128))
    maxima = jnp.pad(maxima, padding, constant_values=-jnp.inf)
    top = row_max[:, None]
    weights = jnp.exp(jnp.where(maxima == top, 0.0, (maxima - top) * inverse_temperature[:, None]))
    groups = (a.reshape(len(a), -1, GROUP).max(axis=-1) for a in (maxima, weights))
    floats = jnp.stack([row_max, inverse_temperature, top_p, min_p], axis=1)
    search = _Search(vocab_size, capacity, target.has_tma)
    run = kernel(
        "kept_cutoff",
        search.body,
        out_type=jax.ShapeDtypeStruct((len(logits), 128), jnp.float32),
        grid=(len(logits),),
        grid_names=("row",),
        scratch_types=[plgpu.SMEM((capacity * CHUNK,), jnp.float32)],
        interpret=interpret,
    )
    cutoffs: jax.Array = run(logits, floats, top_k, maxima, weights, *groups)
    return cutoffs[:, 0]


def capacity_of(target: GpuTarget) -> int:
    """Chunks that a thread block's shared memory holds: a multiple of ``GROUP``."""
    return (target.smem_bytes - _RESERVED_SMEM) // (4 * CHUNK) // GROUP * GROUP


@dataclass(frozen=True)
class _Search:
    """The kernel for one vocabulary."""

    vocab_size: int
    capacity: int
    has_fence: bool

    def body(self, logits: Any, floats: Any, top_k: Any, *rest: Any) -> None:
        *of_chunks, out, kept = rest
        row = lax.axis_index("row")
        top, inverse, p, min_p = (floats[row, i] for i in range(4))
        k = top_k[row]
        has_k, has_p = (k > 0) & (k < self.vocab_size), p < 1.0
        store = lambda cutoff: store_global(out.at[row], _full(cutoff, 128))  # noqa: E731
        nothing = ~has_k & ~has_p & (min_p <= 0.0)
        pl.when(nothing)(lambda: store(jnp.float32(-jnp.inf)))

        @pl.when(~nothing)
        def _search() -> None:
            maxima, weights, group_maxima, group_weights = (array.at[row] for array in of_chunks)
            one = _Row(self, logits.at[row], maxima, weights, group_maxima, group_weights, kept, top, inverse)
            store(one.cutoff(k, p, min_p, has_k, has_p))


@dataclass(frozen=True)
class _Row:
    """One row's search: references to its arrays, and the scalars that turn a logit into a weight."""

    search: _Search
    logits: Any
    maxima: Any
    weights: Any
    group_maxima: Any
    group_weights: Any
    kept: Any
    top: Any
    inverse: Any

    def cutoff(self, k: Any, p: Any, min_p: Any, has_k: Any, has_p: Any) -> Any:
        """The least logit kept."""
        bound = self._bound_of_top_k(k, has_k)
        # Without top-k the weights of all tokens bound top-p from below; with it the bound is good already.
        everything = lax.cond(
            has_p & ~has_k, lambda: self._sum_of_all(self._mass_of(min_p, -jnp.inf)), lambda: jnp.float32(0.0)
        )
        floor = jnp.where(has_p, 0.9 * (1.0 - p) * everything / self.search.vocab_size, 0.0)
        least = jnp.maximum(min_p, floor) * _SLACK
        held = self._compact(bound, least)
        at_k = lax.cond(has_k, lambda: self._top_k(k, bound, held), lambda: jnp.float32(-jnp.inf))
        needs_weights = has_p | (min_p > 0.0)
        return lax.cond(needs_weights, lambda: self._top_p(p, min_p, at_k, has_p, held), lambda: at_k)

    def _weight(self, x: Any, cutoff: Any) -> Any:
        below = jnp.where(x == self.top, 0.0, (x - self.top) * self.inverse)
        return jnp.exp(jnp.where(x >= cutoff, below, -jnp.inf))

    def _mass_of(self, min_p: Any, cutoff: Any) -> Callable[[Any, Any], Any]:
        """``(x, threshold)`` to the weights that count."""

        def mass(x: Any, threshold: Any) -> Any:
            weight = self._weight(x, cutoff)
            return jnp.where((weight >= min_p) & (weight >= threshold), weight, 0.0)

        return mass

    def _bound_of_top_k(self, k: Any, has_k: Any) -> Any:
        """The k-th largest of the chunks' maxima: at least k logits reach it. -inf if there are fewer chunks."""
        size = self.maxima.shape[0]
        values = plgpu.load(self.maxima, layout=_strided(size), optimized=False)
        target = k.astype(jnp.float32)

        def search() -> Any:
            count = lambda t: jnp.where(values >= t, 1.0, 0.0).sum()  # noqa: E731
            low, high = _image(jnp.float32(-jnp.inf)), _image(self.top) + 1
            return _bisect(count, target, low, high, jnp.float32(size), lambda a, b, c: a == target)

        return lax.cond(has_k & (k <= size), search, lambda: jnp.float32(-jnp.inf))

    def _compact(self, bound: Any, least: Any) -> tuple[Any, Any]:
        """Copies the chunks that reach both bounds; how many groups are held, and the first group that is not."""
        layout, num_groups = _strided(CHUNK), self._num_groups
        last = self.search.vocab_size // CHUNK - 1
        capacity = self.search.capacity

        def one(group: Any, carry: Any) -> Any:
            count, first_left = carry
            fits = (first_left == num_groups) & (count + GROUP <= capacity)
            chunks = [group * GROUP + i for i in range(GROUP)]
            reach = [(self.maxima[c] >= bound) & (self.weights[c] >= least) & (c <= last) for c in chunks]
            some = reach[0]
            for each in reach[1:]:
                some = some | each

            places, place = [], count
            for each in reach:
                places.append(place)
                place = place + each.astype(jnp.int32)

            @pl.when(some & fits)
            def _copy() -> None:
                values = [
                    plgpu.load(
                        self.logits.at[pl.ds(jnp.minimum(c, last) * CHUNK, CHUNK)],
                        layout=layout,
                        optimized=False,
                    )
                    for c in chunks
                ]
                for value, place, each in zip(values, places, reach, strict=True):
                    pl.when(each)(partial(store_global, self.kept.at[pl.ds(place * CHUNK, CHUNK)], value))

            left = jnp.where(some & ~fits, jnp.minimum(first_left, group), first_left)
            return jnp.where(fits, place, count), left

        count, first_left = lax.fori_loop(0, num_groups, one, (jnp.int32(0), jnp.int32(num_groups)))
        held = lax.div(count + (GROUP - 1), jnp.int32(GROUP))
        for i in range(GROUP - 1):

            @pl.when(count + i < held * GROUP)
            def _fill(i: int = i) -> None:
                store_global(
                    self.kept.at[pl.ds((count + i) * CHUNK, CHUNK)], _full(jnp.float32(-jnp.inf), CHUNK)
                )

        # Other threads read what was stored. Before Hopper nothing but a wait for copies is a barrier by itself.
        if self.search.has_fence:
            plgpu.commit_smem()
        else:
            plgpu.wait_gmem_to_smem(0)
        return held, first_left

    @property
    def _num_groups(self) -> int:
        return -(-self.search.vocab_size // (GROUP * CHUNK))

    def _group(self, group: Any) -> Any:
        """The logits of a group in global memory; the last group may be shorter, what it lacks is -inf."""
        size = GROUP * CHUNK
        start = jnp.minimum(group * size, self.search.vocab_size - size)
        layout = _strided(size)
        x = plgpu.load(self.logits.at[pl.ds(start, size)], layout=layout, optimized=False)
        place = plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)
        return jnp.where(place >= group * size - start, x, -jnp.inf)

    def _sum_of_all(self, of: Callable[[Any, Any], Any]) -> Any:
        zeros = _full(jnp.float32(0.0), GROUP * CHUNK)
        add = lambda g, acc: acc + of(self._group(g), 0.0)  # noqa: E731
        return lax.fori_loop(0, self._num_groups, add, zeros).sum()

    def _fold(self, held: tuple[Any, Any], reaches: Measure, of: Measure, start: float, join: Any) -> Any:
        """``of`` every group that is held, and of those not held that may count, joined elementwise."""
        size = GROUP * CHUNK
        layout = _strided(size)

        def inside(i: Any, acc: Any) -> Any:
            return join(
                acc, of(plgpu.load(self.kept.at[pl.ds(i * size, size)], layout=layout, optimized=False))
            )

        def outside(group: Any, acc: Any) -> Any:
            return lax.cond(reaches(group), lambda: join(acc, of(self._group(group))), lambda: acc)

        acc = lax.fori_loop(0, held[0], inside, _full(jnp.float32(start), size))
        return lax.fori_loop(held[1], self._num_groups, outside, acc)

    def _top_k(self, k: Any, bound: Any, held: tuple[Any, Any]) -> Any:
        target = k.astype(jnp.float32)

        def count(threshold: Any) -> Any:
            reaches = lambda group: self.group_maxima[group] >= threshold  # noqa: E731
            of = lambda x: jnp.where(x >= threshold, 1.0, 0.0)  # noqa: E731
            return self._fold(held, reaches, of, 0.0, jnp.add).sum()

        low, high = _image(bound), _image(self.top) + 1
        everything = jnp.float32(self.search.vocab_size)
        return _bisect(count, target, low, high, everything, lambda a, b, c: a == target)

    def _top_p(self, p: Any, min_p: Any, at_k: Any, has_p: Any, held: tuple[Any, Any]) -> Any:
        of = self._mass_of(min_p, at_k)

        def reaching(threshold: Any) -> Measure:
            return lambda group: self.group_weights[group] >= threshold * _SLACK

        def mass(threshold: Any) -> Any:
            return self._fold(held, reaching(threshold), lambda x: of(x, threshold), 0.0, jnp.add).sum()

        def search() -> Any:
            total = mass(jnp.float32(0.0))
            floor = jnp.minimum(0.9 * (1.0 - p) * total / self.search.vocab_size, 0.5)
            low, high = _image(floor), _image(jnp.float32(1.0)) + 1
            settled = lambda a, b, value: (a - b < 1.5 * value) & (value > 1e-5 * total)  # noqa: E731
            return _bisect(mass, p * total, low, high, total, settled)

        least = jnp.maximum(lax.cond(has_p, search, lambda: jnp.float32(0.0)), _TINY)
        keep = lambda x: jnp.where(of(x, least) > 0.0, x, jnp.inf)  # noqa: E731
        return self._fold(held, reaching(least), keep, jnp.inf, jnp.minimum).min()


def _bisect(
    measure: Measure,
    target: Any,
    low: Any,
    high: Any,
    at_low: Any,
    is_settled: Callable[[Any, Any, Any], Any],
) -> Any:
    """As in ``jaxpaged.sampler_cutoff``, of one row: scalars throughout."""

    def is_open(carry: Any) -> Any:
        low, high, at_low, at_high, _ = carry
        return (low + 1 < high) & ~is_settled(at_low, at_high, _value(low))

    def step(carry: Any) -> Any:
        low, high, at_low, at_high, count = carry
        image_middle = (low & high) + ((low ^ high) >> 1)
        halved = _image(0.5 * _value(low) + 0.5 * _value(high))
        value_middle = jnp.minimum(jnp.maximum(halved, low + 1), high - 1)
        middle = jnp.where(count & 1 == 0, value_middle, image_middle)
        measured = measure(_value(middle))
        up = measured >= target
        return (
            jnp.where(up, middle, low),
            jnp.where(up, high, middle),
            jnp.where(up, measured, at_low),
            jnp.where(up, at_high, measured),
            count + 1,
        )

    start = (low, high, at_low, jnp.float32(0.0), jnp.int32(0))
    return _value(lax.while_loop(is_open, step, start)[0])


def _image(value: Any) -> Any:
    """float32 -> int32 of the same order."""
    bits = _bitcast(value, jnp.float32, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _value(image: Any) -> Any:
    """Inverse of ``_image``, but for subnormal numbers: 0."""
    bits = image ^ ((image >> 31) & 0x7FFFFFFF)
    return _bitcast(jnp.where(bits & 0x7F800000 == 0, 0, bits), jnp.int32, jnp.float32)


def _bitcast(value: Any, old: Any, new: Any) -> Any:
    """Of a scalar: Mosaic GPU only knows it of vectors."""
    vector = plgpu.layout_cast(jnp.full((128,), value, old), _strided(128))
    return lax.bitcast_convert_type(vector, new).max()


def _strided(size: int) -> Any:
    """How a warpgroup shares a vector: in pieces of up to 16 bytes."""
    vec = max(v for v in (1, 2, 4) if size % (128 * v) == 0)
    return plgpu.Layout.WG_STRIDED((size,), vec_size=vec)


def _full(value: Any, size: int) -> Any:
    return plgpu.layout_cast(jnp.full((size,), value, jnp.float32), _strided(size))
