"""The cases that all implementations share, through both forms of the attention kernel, in the interpreter."""

import pytest

from jaxpaged.pallas_kernels.paged_attention.cases import CASES, Case
from tests.pallas_kernels.mosaic import FORMS, by_name, check

SUPPORTED = [case for case in CASES if case.block_size >= 16]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", SUPPORTED, ids=by_name)
def test_every_case(case: Case, form: str) -> None:
    check(case, FORMS[form])
