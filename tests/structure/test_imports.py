"""One direction of dependency: serve -> jaxpaged (core) -> models -> pallas_kernels -> jax."""

from pathlib import Path

from tests.support import repository
from tests.support.repository import imports, imports_at_load, is_within, python_files, source_modules

LAYERS = {"pallas_kernels": 0, "models": 1, "jaxpaged": 2, "serve": 3}
PURE_HOST_FILES = (
    "beam_group",
    "beam_params",
    "beam_search",
    "block_allocator",
    "block_space",
    "block_table",
    "block_trace",
    "config",
    "deadlines",
    "errors",
    "held_beams",
    "host_tier",
    "kv_layout",
    "memory_monitor",
    "pinned_prefixes",
    "policies",
    "preemption",
    "preemption_cost",
    "prefix_cache",
    "records",
    "request",
    "scheduler",
    "step_plan",
    "unused_slots",
    "waiting_queue",
)
HTTP_AND_TERMINAL = ("fastapi", "starlette", "uvicorn", "aiohttp", "typer", "rich", "prompt_toolkit")
TEST_ORACLES = ("transformers", "torch", "tensorflow", "vllm")


def layer_of(name: str) -> int | None:
    """The layer of a dotted name; ``None`` for what is not ours."""
    if not is_within(name, "jaxpaged"):
        return None
    folder = name.split(".")[1] if "." in name else "jaxpaged"
    return LAYERS.get(folder, LAYERS["jaxpaged"])


def offenders(paths: list[Path], *packages: str) -> list[str]:
    return [f"{p}:{line} {name}" for p in paths for line, name in imports(p) if is_within(name, *packages)]


def test_nothing_imports_the_folders_as_top_level_packages() -> None:
    assert offenders(python_files(), "models", "pallas_kernels", "serve") == []


def test_imports_point_downwards() -> None:
    wrong = []
    for path in python_files(*repository.SOURCE_FOLDERS):
        own = LAYERS[path.parts[0]]
        for line, name in imports(path):
            layer = layer_of(name)
            if layer is not None and layer > own:
                wrong.append(f"{path}:{line} {name}")
    assert wrong == []


def test_core_knows_no_http_and_no_terminal() -> None:
    assert offenders(python_files("jaxpaged", "models", "pallas_kernels"), *HTTP_AND_TERMINAL) == []


def test_serve_holds_no_device_arrays() -> None:
    assert offenders(python_files("serve"), "jax.numpy", "jax.lax", "flax") == []


def test_test_oracles_are_not_used_by_the_package() -> None:
    assert offenders(python_files(*repository.SOURCE_FOLDERS), *TEST_ORACLES) == []


def test_pure_host_files_load_neither_jax_nor_numpy() -> None:
    wrong = []
    for stem in PURE_HOST_FILES:
        pending, seen = [f"jaxpaged.{stem}"], set()
        while pending:
            path = source_modules().get(pending.pop())
            if path is None or path in seen or path == Path("jaxpaged/__init__.py"):
                continue
            seen.add(path)
            for line, name in imports_at_load(path):
                if is_within(name, "jax", "jaxlib", "numpy", "flax"):
                    wrong.append(f"jaxpaged/{stem}.py: {path}:{line} {name}")
                pending += [name, name.rpartition(".")[0]]
    assert wrong == []


def test_pure_host_files_use_no_jax_or_numpy_inside_functions_either() -> None:
    paths = [path for path in python_files("jaxpaged") if path.parts == ("jaxpaged", path.name)]
    assert offenders([p for p in paths if p.stem in PURE_HOST_FILES], "jax", "jaxlib", "numpy") == []


def test_jaxtyping_files_evaluate_their_annotations() -> None:
    wrong = []
    for path in python_files(*repository.SOURCE_FOLDERS):
        names = [name for _, name in imports(path)]
        if "__future__.annotations" in names and any(is_within(name, "jaxtyping") for name in names):
            wrong.append(str(path))
    assert wrong == []


def test_notebooks_use_the_public_interface_only() -> None:
    public = ("jaxpaged", "jaxpaged.models", "jaxpaged.pallas_kernels", "jaxpaged.serve")
    wrong = []
    for path in python_files("notebooks"):
        for line, name in imports(path):
            package, _, last = name.rpartition(".")
            if (
                is_within(name, "jaxpaged")
                and name not in public
                and (package not in public or last[0] == "_")
            ):
                wrong.append(f"{path}:{line} {name}")
    assert wrong == []
