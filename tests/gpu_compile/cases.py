"""Every case, by name. To add one, write a function that makes its program and list it in a module named here.

Building is lazy: a case is built in the process that compiles it, and one that needs what is not written yet raises
``UnavailableError``.
"""

from tests.gpu_compile import (
    attention_cases,
    engine_cases,
    fused_cases,
    gradient_cases,
    planted_cases,
    pool_cases,
)
from tests.gpu_compile.case import CompileCase


def _by_name(*cases: CompileCase) -> dict[str, CompileCase]:
    named = {case.name: case for case in cases}
    assert len(named) == len(cases), "two cases have one name"
    return named


# What the tests compile.
CASES = _by_name(
    planted_cases.SOUND,
    *pool_cases.CASES,
    *attention_cases.CASES,
    *gradient_cases.CASES,
    *engine_cases.CASES,
    *fused_cases.CASES,
)

# Compiled only where they are asked for: those with planted faults, and every combination of settings.
ON_REQUEST = _by_name(*planted_cases.FAULTY, *attention_cases.every_combination())


def find_case(name: str) -> CompileCase:
    """A case of either kind."""
    return ON_REQUEST[name] if name in ON_REQUEST else CASES[name]
