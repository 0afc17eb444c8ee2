"""Kernels that lost to what XLA makes, kept here to be measured again.

Residual and RMSNorm: XLA adds the residual in the epilogue of the product before, or while it sums the parts of a
split one, and applies the norm's scale in the prologue of the product after. A kernel of its own takes the sum out of
the epilogue: one more array is written and read.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpaged.pallas_kernels.mosaic_gpu import kernel, store_global


def residual_norm(
    x: jax.Array, y: jax.Array, scale: jax.Array, eps: float, *, interpret: Any = None
) -> tuple[jax.Array, jax.Array]:
    """``s = x + y`` and its RMS norm (Zhang and Sennrich 2019, arXiv:1910.07467), one thread block a row.

    Args:
      x, y: bfloat16 ``[T, E]``.
      scale: ``[E]``.
      eps: added to the mean square.
      interpret: see ``mosaic_gpu.kernel``.

    Returns:
      The sum and the norm, ``[T, E]`` in x's dtype.
    """
    num_tokens, size = x.shape
    run = kernel(
        "residual_norm",
        partial(_body, size, eps),
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype)] * 2,
        grid=(num_tokens,),
        grid_names=("token",),
        interpret=interpret,
    )
    total, normed = run(x, y, scale.astype(x.dtype))
    return total, normed


def _body(size: int, eps: float, x: Any, y: Any, scale: Any, total: Any, normed: Any) -> None:
    token = lax.axis_index("token")
    layout = plgpu.Layout.WG_STRIDED((size,), vec_size=8)
    load = partial(plgpu.load, layout=layout, optimized=False)
    rounded = load(x.at[token]) + load(y.at[token])
    store_global(total.at[token], rounded)
    wide = rounded.astype(jnp.float32)
    inverse = lax.rsqrt((wide * wide).sum() / size + eps)
    store_global(normed.at[token], load(scale) * (wide * inverse).astype(x.dtype))
