"""Every case, by name. To add one, write a function that makes its program and list it in a module named here.

Building is lazy: a case is built in the process that compiles it, and one that needs what is not written yet raises
``UnavailableError``.
"""

from tests.gpu_compile import planted_cases, pool_cases
from tests.gpu_compile.case import CompileCase

_SOUND = (planted_cases.SOUND, *pool_cases.CASES)

CASES: dict[str, CompileCase] = {case.name: case for case in _SOUND}
PLANTED: dict[str, CompileCase] = {case.name: case for case in planted_cases.FAULTY}
assert len(CASES) == len(_SOUND), "two cases have one name"


def find_case(name: str) -> CompileCase:
    """A case by name, with planted faults or without."""
    return PLANTED[name] if name in PLANTED else CASES[name]
