"""The cases that all implementations share, through the attention kernel's forms, in the interpreter.

The portable form takes all of them; Hopper's share plan, masks and variants with it and take what differs between
products, copies and sizes. (``test_mosaic_prefill`` has those of the prefill form.)
"""

import pytest

from jaxpaged.pallas_kernels.paged_attention.cases import CASES, Case
from tests.pallas_kernels.mosaic import FORMS, by_name, check

SUPPORTED = [case for case in CASES if case.block_size >= 16]


ON_HOPPER = {
    "mixed",
    "long_row",
    "mqa",
    "head_dim_96",
    "head_dim_256",
    "block_size_128",
    "long_window",
    "all_at_once",
}


@pytest.mark.parametrize("case", SUPPORTED, ids=by_name)
def test_every_case(case: Case) -> None:
    check(case, FORMS["mma"])


@pytest.mark.parametrize("case", [case for case in SUPPORTED if case.name in ON_HOPPER], ids=by_name)
def test_on_hopper(case: Case) -> None:
    check(case, FORMS["wgmma"])
