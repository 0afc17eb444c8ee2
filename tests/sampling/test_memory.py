"""The compiled sampler updates its state in place, and hands no logits from one part of it to another by a copy."""

import re

import jax
import numpy as np

from jaxpaged import sampler
from jaxpaged.sampling_rows import SamplingTable
from tests.sampling.step import compiled_sample, compiled_set_row

ROWS, VOCAB, BATCH = 129, 4096, 8


def test_state_is_donated_and_never_copied() -> None:
    state = jax.eval_shape(lambda: sampler.init_sampler_state(ROWS, VOCAB))
    batch = SamplingTable(ROWS).batch(np.zeros(BATCH, np.int32), np.zeros(BATCH, np.int32))
    logits = jax.ShapeDtypeStruct((BATCH, VOCAB), np.float32)
    compiled = compiled_sample.lower(logits, state, batch, max_logprobs=5).compile()
    analysis = compiled.memory_analysis()
    assert analysis.alias_size_in_bytes >= ROWS * VOCAB * 9
    assert (
        analysis.temp_size_in_bytes < 16 * BATCH * VOCAB * 4
    )  # a few arrays like the logits, far below the state
    assert analysis.temp_size_in_bytes < ROWS * VOCAB * 4
    assert re.findall(rf"= f32\[{BATCH},{VOCAB}\]\S* copy\(.*", compiled.as_text()) == []


def test_setting_a_row_is_in_place() -> None:
    state = jax.eval_shape(lambda: sampler.init_sampler_state(ROWS, VOCAB))
    row = [jax.ShapeDtypeStruct((VOCAB,), dtype) for dtype in (np.int32, np.bool_, np.float32)]
    analysis = compiled_set_row.lower(state, np.int32(3), *row).compile().memory_analysis()
    assert analysis.alias_size_in_bytes >= ROWS * VOCAB * 9
    assert analysis.temp_size_in_bytes < 2 * VOCAB * 9


def test_set_bias_row_keeps_the_counts() -> None:
    state = sampler.init_sampler_state(3, 8)
    counts, mask = np.arange(8, dtype=np.int32), np.ones(8, np.bool_)
    state = compiled_set_row(state, np.int32(2), counts, mask, np.zeros(8, np.float32))
    bias = np.full(8, -np.inf, np.float32)
    state = jax.jit(sampler.set_bias_row, donate_argnums=0)(state, np.int32(2), bias)
    np.testing.assert_array_equal(state.output_counts[2], counts)
    np.testing.assert_array_equal(state.logit_bias[2], bias)
    assert not np.asarray(state.logit_bias)[:2].any()
