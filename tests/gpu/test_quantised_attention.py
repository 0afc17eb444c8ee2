"""The attention kernel over codes and scales on a GPU, in every format and form, against float64."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxpaged.pallas_kernels.paged_attention.cases import CASES, Case
from jaxpaged.pallas_kernels.quantisation import FORMATS
from tests.gpu.kernel import SUPPORTED_CASES, attend, forms, require
from tests.pallas_kernels import oracle
from tests.pallas_kernels.quantised import Inputs, numbers_of, quantised_inputs

pytestmark = pytest.mark.gpu

SEEDS = 12


def by_name(case: Case) -> str:
    return case.name


def check(names: list[str], case: Case, inputs: Inputs) -> None:
    """At most three times the error of the reference in the same precision, as in the interpreter."""
    exact = oracle.softmax_attention(inputs[0], numbers_of(inputs[1]), 1, inputs[2], case.variant)
    with jax.default_matmul_precision("highest"):  # a GPU's default for float32 products is coarser
        plain = oracle.attend("reference", case, inputs)[: len(exact)]
    allowed = 3 * float(np.abs(plain - exact).max()) + 1e-5
    for name in names:
        out = attend(name, case, inputs)
        assert np.isfinite(out).all(), f"{name}, padding included"
        assert np.abs(out[: len(exact)] - exact).max() <= allowed, name


def takes(case: Case, name: str) -> bool:
    """Words of int4 make operands of 16 elements of D at a time."""
    return name != "int4" or case.head_dim % 64 == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", SUPPORTED_CASES, ids=by_name)
def test_every_case_in_every_form(case: Case, name: str, dtype: str) -> None:
    """Before Hopper cp.async cannot copy blocks of 16 where a row has 16 or 48 words: larger ones there."""
    if not takes(case, name):
        case = replace(case, head_dim=128)
    if "wgmma" not in forms() and case.head_dim < 128:
        case = replace(case, block_size=max(case.block_size, 64))
    names = [form for form in forms() if form != "prefill" or case.head_dim <= 128]
    check(names, case, quantised_inputs(case, FORMATS[name], dtype))


@pytest.mark.parametrize("form", ["mma", "wgmma", "prefill"])
@pytest.mark.parametrize("name", FORMATS)
def test_random_numbers_again_and_again(name: str, form: str) -> None:
    """A race or a missed wait shows on some runs only. Results of one input are the same every time."""
    require(form)
    case = replace(next(case for case in CASES if case.name == "all_at_once"), head_dim=128)
    for seed in range(SEEDS):
        inputs = quantised_inputs(case, FORMATS[name], "bfloat16", seed)
        check([form], case, inputs)
        first, *again = [attend(form, case, inputs) for _ in range(3)]
        for out in again:
            np.testing.assert_array_equal(out, first)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_very_different_length(name: str) -> None:
    rows = ((12_000, 1), *((17 * i, 1) for i in range(40)), (5_000, 3))
    case = Case("ragged", rows, num_heads=8, num_kv_heads=2, head_dim=128)
    check(["chosen", *forms()], case, quantised_inputs(case, FORMATS[name], "bfloat16"))
