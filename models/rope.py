"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), rotate-half form as in Hugging Face's Llama."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.models.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Angle per position of each pair, float32 [D/2], after the config's scaling."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / np.float32(scaling.factor)
    return _llama3(frequencies, scaling)


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Stretches long wavelengths only, with a linear blend between the two limits (Llama 3.1)."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * frequencies / scaling.factor + blend * frequencies).astype(np.float32)


def rope_tables(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [..., 1, D/2] for int32 positions [...]; the 1 broadcasts over heads."""
    frequencies = jnp.asarray(inverse_frequencies(config))
    angles = jnp.expand_dims(positions.astype(jnp.float32), (-2, -1)) * frequencies.reshape(
        (1,) * (positions.ndim + 1) + (-1,)
    )
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [..., H, D] by the tables of ``rope_tables``; computes in float32, returns x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
