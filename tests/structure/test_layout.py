"""Small files, small functions, names that say something, nothing of the machine they were written on."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.support.repository import ROOT, SOURCE_FOLDERS, python_files, repository_files, tree_of

# About 400 and 50 are the rule; the margin is for what would only be cut to please a test.
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 70

Function = ast.FunctionDef | ast.AsyncFunctionDef
MACHINE_PATH = re.compile(r"(?<![\w.}])/(?:work|root|tmp|home|Users)/\w")
CHECKING_CALL = re.compile(r"assert|raises|warns|check|expect|fail", re.IGNORECASE)


def definitions(kind: type | tuple[type, ...], *folders: str) -> Iterator[tuple[Path, ast.AST]]:
    for path in python_files(*folders):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, kind):
                yield path, node


def test_files_are_short() -> None:
    lengths = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in python_files()}
    assert {str(path): n for path, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    long = {}
    for path, node in definitions((ast.FunctionDef, ast.AsyncFunctionDef)):
        assert isinstance(node, Function)
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > MAX_FUNCTION_LINES:
            long[f"{path}:{node.lineno} {node.name}"] = lines
    assert long == {}


def test_names_say_what_a_thing_is() -> None:
    vague_files = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
    wrong = [str(path) for path in python_files() if path.name in vague_files]
    for path, node in definitions(ast.ClassDef, *SOURCE_FOLDERS):
        assert isinstance(node, ast.ClassDef)
        if re.search(r"^Base[A-Z]|Base$|Manager$|Mixin", node.name):
            wrong.append(f"{path}:{node.lineno} {node.name}")
    assert wrong == []


def test_the_package_is_not_configured_by_environment_variables() -> None:
    reads = []
    for path, node in definitions((ast.Attribute, ast.Name), *SOURCE_FOLDERS):
        if ast.unparse(node) in {"os.environ", "os.getenv", "environ", "getenv"}:
            reads.append(f"{path}:{node.lineno}")
    assert reads == []


def test_no_file_names_a_path_of_one_machine() -> None:
    wrong = []
    for path in repository_files():
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        wrong += [f"{path}: {match.group()}" for match in MACHINE_PATH.finditer(text)]
    assert wrong == []


def test_every_test_checks_something() -> None:
    idle = []
    for path, node in definitions((ast.FunctionDef, ast.AsyncFunctionDef), "tests"):
        assert isinstance(node, Function)
        if path.name.startswith("test_") and node.name.startswith("test_") and not checks_something(node):
            idle.append(f"{path}:{node.lineno} {node.name}")
    assert idle == []


def checks_something(function: Function) -> bool:
    """Whether it asserts, or calls something that by its name does."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call) and CHECKING_CALL.search(ast.unparse(node.func)):
            return True
    return False
