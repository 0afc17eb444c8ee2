"""top-k, top-p and min-p without sorting: the exact value that the kept logits of a row reach.

Each of the three keeps the most likely tokens down to some value, so each is a threshold, and so is their
combination. A threshold is found by bisection on the order-preserving integer image of float32: exact, not
up to a tolerance, at one masked sum over the row per step and a few dozen steps at the very most. Tokens tied
at a threshold are all kept, so that the choice never depends on their order.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from jaxpaged.sampler_choice import weights

# low, high (images), the measure at each, number of steps
_Carry = tuple[Array, Array, Array, Array, Array]


def kept_cutoff(
    logits: Array,
    row_max: Array,
    inverse_temperature: Array,
    top_k: Array,
    top_p: Array,
    min_p: Array,
    *,
    implementation: str = "xla",
) -> Array:
    """The least logit that min-p, then top-k, then top-p keep: float32 [B]; -inf where nothing is filtered.

    logits float32 [B, V]; the others [B]: row_max and inverse_temperature float32, top_k int32 (0 or at least V
    is off), top_p float32 in (0, 1] (1 is off), min_p float32 in [0, 1] (0 is off). As in vLLM, top-p counts
    probabilities renormalised over what the other two keep; the most likely token is always kept.
    implementation: "xla", or "mosaic_gpu" for one kernel on a GPU, which keeps the same tokens.
    """
    if implementation == "mosaic_gpu":
        # Imported where it is used: Mosaic GPU takes a quarter of a second to load.
        from jaxpaged.pallas_kernels.kept_cutoff.mosaic_gpu import kept_cutoff_mosaic_gpu

        return kept_cutoff_mosaic_gpu(logits, row_max, inverse_temperature, top_k, top_p, min_p)
    if implementation != "xla":
        raise ValueError(f"kept_cutoff: implementation={implementation!r} is none of ['mosaic_gpu', 'xla']")
    at_top_k = _top_k_cutoff(logits, row_max, top_k)
    weight = weights(logits, row_max, inverse_temperature, at_top_k)
    weight = jnp.where(weight >= min_p[:, None], weight, 0.0)
    least = jnp.maximum(_top_p_weight(weight, top_p), jnp.finfo(jnp.float32).tiny)
    # Back from weights to logits, so that one comparison of logits decides from here on.
    by_weight = jnp.where(weight >= least[:, None], logits, jnp.inf).min(axis=-1)
    return jnp.where((top_p < 1.0) | (min_p > 0.0), by_weight, at_top_k)


def _top_k_cutoff(logits: Array, row_max: Array, top_k: Array) -> Array:
    """The k-th largest logit of each row; -inf where top-k is off or keeps every finite logit anyway."""
    is_on = (top_k > 0) & (top_k < logits.shape[1])
    lowest = jnp.where(logits > -jnp.inf, logits, row_max[:, None]).min(axis=-1)
    low = _image(jnp.where(is_on, lowest, -jnp.inf))
    high = jnp.where(is_on, _image(row_max), low) + 1
    target = top_k.astype(jnp.float32)

    def count(threshold: Array) -> Array:
        # Counted in float32, exact up to 2**24: XLA:CPU sums float32 faster than int32.
        return jnp.where(logits >= threshold[:, None], 1.0, 0.0).sum(axis=-1)

    def is_settled(at_low: Array, _at_high: Array, _low: Array) -> Array:
        return at_low == target

    everything = jnp.full(target.shape, float(logits.shape[1]), jnp.float32)
    return _bisect(count, target, low, high, everything, is_settled)


def _top_p_weight(weight: Array, top_p: Array) -> Array:
    """The largest weight such that what reaches it sums to ``top_p`` of the row; 0 where top-p is off."""
    is_on = top_p < 1.0
    total = weight.sum(axis=-1)
    target = top_p * total
    # All weights below this sum to less than 1 - top_p, so the threshold cannot be lower (0.9: rounding).
    floor = jnp.where(is_on, 0.9 * (1.0 - top_p) * total / weight.shape[1], 0.0)
    low = _image(jnp.minimum(floor, 0.5))
    high = jnp.where(is_on, _image(jnp.ones_like(top_p)), low) + 1

    def mass(threshold: Array) -> Array:
        return jnp.where(weight >= threshold[:, None], weight, 0.0).sum(axis=-1)

    def is_settled(at_low: Array, at_high: Array, low: Array) -> Array:
        # Between the bounds lies less than the weight of two tokens: just one, which has to be kept. Only
        # trusted where rounding of the sums is small beside that weight.
        return (at_low - at_high < 1.5 * low) & (low > 1e-5 * total)

    return _bisect(mass, target, low, high, total, is_settled)


def _bisect(
    measure: Callable[[Array], Array],
    target: Array,
    low: Array,
    high: Array,
    at_low: Array,
    is_settled: Callable[[Array, Array, Array], Array],
) -> Array:
    """The largest float32 per row whose ``measure``, which falls as its argument grows, reaches ``target``.

    low, high: int32 [B] images; ``low`` reaches the target, ``high`` does not, and where they are neighbours
    ``low`` is the answer. at_low: an upper bound of the measure at ``low``. is_settled(at_low, at_high, low
    as a float) tells early that ``low`` separates the kept from the rest.
    """

    def is_open(low: Array, high: Array, at_low: Array, at_high: Array) -> Array:
        return (low + 1 < high) & ~is_settled(at_low, at_high, _value(low))

    def step(carry: _Carry) -> _Carry:
        low, high, at_low, at_high, count = carry
        active = is_open(low, high, at_low, at_high)
        # Halving the images bounds the number of steps, halving the values is quicker on spread-out logits:
        # take turns. Both stay strictly between the bounds.
        image_middle = (low & high) + ((low ^ high) >> 1)
        value_middle = jnp.clip(_image(0.5 * _value(low) + 0.5 * _value(high)), low + 1, high - 1)
        middle = jnp.where(count % 2 == 0, value_middle, image_middle)
        measured = measure(_value(middle))
        up = active & (measured >= target)
        down = active & ~up
        return (
            jnp.where(up, middle, low),
            jnp.where(down, middle, high),
            jnp.where(up, measured, at_low),
            jnp.where(down, measured, at_high),
            count + 1,
        )

    start = (low, high, at_low, jnp.zeros_like(at_low), jnp.int32(0))
    return _value(lax.while_loop(lambda carry: is_open(*carry[:4]).any(), step, start)[0])


def _image(values: Array) -> Array:
    """float32 -> int32 of the same order (-inf lowest; only NaN lies outside the infinities)."""
    bits = lax.bitcast_convert_type(values, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _value(image: Array) -> Array:
    """Inverse of ``_image``, but for subnormal numbers: 0, as which XLA:CPU compares them."""
    bits = image ^ ((image >> 31) & 0x7FFFFFFF)
    is_subnormal = bits & 0x7F800000 == 0
    return lax.bitcast_convert_type(jnp.where(is_subnormal, 0, bits), jnp.float32)
