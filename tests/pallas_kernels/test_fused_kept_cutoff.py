"""The search for a row's cutoff on one chip keeps the tokens that the sampler's own keeps, and the draw is the same."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.pallas_kernels.kept_cutoff.mosaic_gpu import CHUNK, kept_cutoff_mosaic_gpu
from jaxpaged.pallas_kernels.mosaic_gpu import GpuTarget
from jaxpaged.sampler_choice import chunked, draw, uniforms
from jaxpaged.sampler_cutoff import kept_cutoff
from tests.pallas_kernels.interpreter import interpreter

VOCAB = 11 * CHUNK  # a whole group of eight chunks, and a shorter one


class Row(NamedTuple):
    """A row's logits, by their deviation, and its parameters."""

    deviation: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    temperature: float = 1.0


ROWS = [
    Row(3.0, top_p=0.9),
    Row(3.0, top_k=5, temperature=0.7),
    Row(2.0, top_k=40, top_p=0.8, min_p=0.01),
    Row(1.0, top_k=VOCAB),
    Row(2.0, min_p=0.1),
    Row(0.0, top_k=3, top_p=0.5),  # without a finite logit
]
Arrays = tuple[jax.Array, ...]


def arguments(rows: list[Row]) -> Arrays:
    rng = np.random.default_rng(3)
    logits = np.stack([row.deviation * rng.standard_normal(VOCAB) for row in rows]).astype(np.float32)
    logits[:, 10:14] = logits[:, 20:21]  # ties are kept together
    logits[0, :300] = -np.inf
    logits[0, 2500] = np.nan
    logits[[row.deviation == 0.0 for row in rows]] = -np.inf
    column = lambda name, dtype: jnp.asarray([getattr(row, name) for row in rows], dtype)  # noqa: E731
    return (
        jnp.asarray(logits),
        jnp.asarray(np.nanmax(logits, axis=1)),
        1.0 / column("temperature", jnp.float32),
        column("top_k", jnp.int32),
        column("top_p", jnp.float32),
        column("min_p", jnp.float32),
    )


def test_the_same_tokens_are_kept_and_drawn() -> None:
    """Shared memory for eight of eleven chunks: enough for the rows with a small top_k, too little for the others."""
    inputs = arguments(ROWS)
    logits, row_max, inverse = inputs[:3]
    expected = kept_cutoff(*inputs)
    with interpreter(detect_races=False) as interpret:
        found = jax.block_until_ready(kept_cutoff_mosaic_gpu(*inputs, capacity=8, interpret=interpret))
    assert not np.isnan(found).any()
    for row, wanted, cutoff in zip(np.asarray(logits), np.asarray(expected), np.asarray(found), strict=True):
        np.testing.assert_array_equal(row >= cutoff, row >= wanted)
    assert (np.asarray(found) == -np.inf).tolist() == (np.asarray(expected) == -np.inf).tolist()
    seeds = jnp.arange(2 * len(ROWS), dtype=jnp.uint32).reshape(-1, 2)
    noise = uniforms(seeds, jnp.arange(len(ROWS)))
    tokens = [draw(chunked(logits), row_max, inverse, cutoff, noise) for cutoff in (expected, found)]
    np.testing.assert_array_equal(*(np.asarray(token) for token in tokens))


def test_what_the_kernel_cannot_take_is_refused() -> None:
    inputs = arguments(ROWS[:3])
    with pytest.raises(NotImplementedError, match="vocab_size=2815"):
        kept_cutoff_mosaic_gpu(inputs[0][:, 1:], *inputs[1:], target=GpuTarget((9, 0), 132, "some"))
    with pytest.raises(NotImplementedError, match=r"compute capability 7\.5"):
        kept_cutoff_mosaic_gpu(*inputs, target=GpuTarget((7, 5), 40, "T4"))
    with pytest.raises(ValueError, match="implementation='triton'"):
        kept_cutoff(*inputs, implementation="triton")
    if jax.default_backend() == "cpu":
        with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
            kept_cutoff(*inputs, implementation="mosaic_gpu")
