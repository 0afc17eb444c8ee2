"""Strict by default: the CPU, no implicit rank promotion, reproducible examples, warnings are errors."""

import importlib.util
import os

import hypothesis
import jaxtyping
import pytest

from tests.support.repository import ROOT, imports, is_within, module_name, python_files

# Set through the environment as well, before jax is imported, so that subprocesses run under the same rules.
JAX_OPTIONS = {
    "jax_numpy_rank_promotion": "raise",
    # Compiled programs are kept between runs. The bound on the size also makes jax lock the folder, which
    # parallel test processes need.
    "jax_compilation_cache_dir": str(ROOT / ".cache" / "jax"),
    "jax_compilation_cache_max_size": 4 * 2**30,
    "jax_persistent_cache_min_compile_time_secs": 0.1,
}

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("ci")


def checked_modules() -> list[str]:
    """The kernels' modules whose calls are checked against their shape annotations.

    Not those that numba compiles: it cannot see through the wrapper that does the checking. Nor that of the
    pytrees, which jax also builds of placeholders.
    """
    unchecked = {"__init__.py", "batch.py"}
    paths = python_files("pallas_kernels")
    compiled = {
        path for path in paths if any(is_within(name, "numba", "llvmlite") for _, name in imports(path))
    }
    return [module_name(path) for path in paths if path not in compiled and path.name not in unchecked]


# Before anything imports jaxpaged: only modules imported from here on are instrumented. An interpreter with a JAX
# of its own (`make GPU_PYTHON=... gpu-test`) may lack beartype; the environment of `make test` has it.
if importlib.util.find_spec("beartype") is not None:
    jaxtyping.install_import_hook(checked_modules(), "beartype.beartype")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="run on the GPU, the tests marked gpu included")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--gpu"):
        os.environ["JAX_PLATFORMS"] = "cpu"
        # Threads of a kernel in the Mosaic GPU interpreter wait for each other inside of XLA's threads: with a thread
        # for each of two cores none was left to go on, now and then.
        os.environ.setdefault("PJRT_NPROC", "8")
    for name, value in JAX_OPTIONS.items():
        os.environ[name.upper()] = str(value)

    import jax

    for name, value in JAX_OPTIONS.items():
        jax.config.update(name, value)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--gpu"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: run with --gpu"))
