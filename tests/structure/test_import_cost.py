"""Importing the whole public interface is cheap and loads nothing that only some uses need."""

import json
import statistics
import subprocess
import sys

import pytest

# The bar is 1.5 s on an idle core. CPU time of the process is compared, not wall time: parallel tests and a busy
# CI machine stretch the latter without the import having become slower.
MAX_IMPORT_SECONDS = 1.5
LAZY = (
    "IPython",
    "fastapi",
    "llvmlite",
    "matplotlib",
    "numba",
    "optax",
    "prompt_toolkit",
    "rich",
    "tokenizers",
    "torch",
    "transformers",
    "typer",
)
PROGRAM = """
import json, sys, time
start = time.process_time()
import flax.nnx
inherited = set(sys.modules)  # flax loads a good deal when it finds it installed, rich and IPython among it
import jaxpaged
for name in jaxpaged.__all__:  # the package loads its parts when they are first named
    getattr(jaxpaged, name)
seconds = time.process_time() - start
print(json.dumps([seconds, sorted({name.partition(".")[0] for name in set(sys.modules) - inherited})]))
"""


@pytest.fixture(scope="module")
def imported() -> tuple[float, set[str]]:
    """Median CPU seconds of three fresh imports, and the packages that the last loaded beyond flax's."""
    runs = []
    for _ in range(3):
        command = [sys.executable, "-c", PROGRAM]
        runs.append(json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout))
    return statistics.median(seconds for seconds, _ in runs), set(runs[-1][1])


def test_import_is_fast(imported: tuple[float, set[str]]) -> None:
    assert imported[0] < MAX_IMPORT_SECONDS


def test_import_loads_nothing_optional(imported: tuple[float, set[str]]) -> None:
    assert imported[1].intersection(LAZY) == set()
