"""What the repository is made of, as git sees it: build products and environments do not count."""

import ast
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE_FOLDERS = ("jaxpaged", "models", "pallas_kernels", "serve")
IGNORED_FOLDERS = frozenset({".git", ".venv", ".uv", ".cache", ".typecheck", "__pycache__", "build", "dist"})


@functools.cache
def repository_files() -> tuple[Path, ...]:
    """Files relative to the root: tracked and new ones of a checkout, all of an unpacked archive."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = (
            subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
        )
    except (OSError, subprocess.CalledProcessError):
        paths = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        return tuple(sorted(path for path in paths if not IGNORED_FOLDERS.intersection(path.parts)))
    return tuple(sorted({Path(name) for name in listed if name and (ROOT / name).is_file()}))


def python_files(*folders: str) -> list[Path]:
    """Python files below ``folders``, or all of them."""
    files = [path for path in repository_files() if path.suffix == ".py"]
    return [path for path in files if path.parts[0] in folders] if folders else files


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file given relative to the root."""
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def module_name(path: Path) -> str:
    """``models/families/llama.py`` -> ``jaxpaged.models.families.llama``."""
    parts = path.with_suffix("").parts
    parts = parts if parts[0] == "jaxpaged" else ("jaxpaged", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def source_modules() -> dict[str, Path]:
    """Every module of the package with its file."""
    return {module_name(path): path for path in python_files(*SOURCE_FOLDERS)}


def imported_names(node: ast.stmt, path: Path) -> list[str]:
    """Modules that one import statement of ``path`` names, absolute; ``from a import b`` gives ``a.b``."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = module_name(path).split(".")
        package = package if path.name == "__init__.py" else package[:-1]
        above = package[: len(package) - node.level + 1]
        base = ".".join([*above, base] if base else above)
    return [f"{base}.{alias.name}" for alias in node.names]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import of a file, those inside functions included."""
    for node in ast.walk(tree_of(path)):
        for name in imported_names(node, path) if isinstance(node, ast.stmt) else ():
            yield node.lineno, name


def imports_at_load(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of the imports that run when the file itself is imported."""
    pending: list[ast.AST] = [tree_of(path)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
            continue
        for name in imported_names(node, path) if isinstance(node, ast.stmt) else ():
            yield node.lineno, name
        pending.extend(ast.iter_child_nodes(node))


def is_within(name: str, *packages: str) -> bool:
    """Whether the dotted ``name`` is one of ``packages`` or lies inside one."""
    return any(name == package or name.startswith(package + ".") for package in packages)
