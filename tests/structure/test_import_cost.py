"""Importing the whole public interface is cheap and loads nothing that only some uses need."""

import json
import statistics
import subprocess
import sys
from typing import NamedTuple

import pytest

MAX_IMPORT_SECONDS = 1.5
# Naming all that is public loads jax and flax, 1.0 to 1.6 s of CPU time that are not ours, by how busy the machine
# is. What is ours is measured against them in the same process, where a slow machine slows both; 0.11 is usual.
MAX_SHARE_OF_FLAX = 0.25
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
IMPORT = """
import time
start = time.process_time()
import jaxpaged
print(time.process_time() - start)
"""
NAME_EVERYTHING = """
import json, sys, time
start = time.process_time()
import flax.nnx
inherited = set(sys.modules)  # flax loads a good deal when it finds it installed, rich and IPython among it
middle = time.process_time()
import jaxpaged
for name in jaxpaged.__all__:  # the package loads its parts when they are first named
    getattr(jaxpaged, name)
seconds = time.process_time() - middle
packages = sorted({name.partition(".")[0] for name in set(sys.modules) - inherited})
print(json.dumps([seconds / (middle - start), packages]))
"""


class Naming(NamedTuple):
    """What naming everything public costs and loads."""

    share_of_flax: float  # CPU time beside that of importing flax, median of three processes
    packages: set[str]  # loaded beyond flax's


def _printed(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout


@pytest.fixture(scope="module")
def naming() -> Naming:
    runs = [json.loads(_printed(NAME_EVERYTHING)) for _ in range(3)]
    return Naming(statistics.median(share for share, _ in runs), set(runs[-1][1]))


def test_import_is_fast() -> None:
    assert min(float(_printed(IMPORT)) for _ in range(3)) < MAX_IMPORT_SECONDS


def test_naming_everything_adds_little_to_flax(naming: Naming) -> None:
    assert naming.share_of_flax < MAX_SHARE_OF_FLAX


def test_naming_everything_loads_nothing_optional(naming: Naming) -> None:
    assert naming.packages.intersection(LAZY) == set()
