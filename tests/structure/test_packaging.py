"""Wheel and source archive hold all sub-packages and their data, and the wheel works by itself."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import jaxpaged
from tests.support.repository import ROOT, SOURCE_FOLDERS, repository_files

BUILD = """
import sys
from setuptools import build_meta
getattr(build_meta, "build_" + sys.argv[1])(sys.argv[2])
"""
DATA = (".json", ".safetensors", ".jinja", ".html", ".css", ".js", ".svg", ".typed")
IMPORTS = """
import sys
import jaxpaged, jaxpaged.models, jaxpaged.pallas_kernels, jaxpaged.serve
for name in ("jaxpaged", "jaxpaged.models", "jaxpaged.pallas_kernels", "jaxpaged.serve"):
    print(sys.modules[name].__file__)
"""


@pytest.fixture(scope="module")
def source_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's files without build products, so that nothing stale gets into an archive."""
    copy = tmp_path_factory.mktemp("source")
    for path in repository_files():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, copy / path)
    return copy


def build(kind: str, source: Path, target: Path) -> Path:
    command = [sys.executable, "-c", BUILD, kind, str(target)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    [archive] = target.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(source_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", source_copy, tmp_path_factory.mktemp("wheel"))


def shipped_files() -> set[Path]:
    """What of the source folders belongs into every archive."""
    files = [path for path in repository_files() if path.parts[0] in SOURCE_FOLDERS]
    return {path for path in files if path.suffix == ".py" or path.suffix in DATA}


def test_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    expected = {
        (path if path.parts[0] == "jaxpaged" else Path("jaxpaged") / path).as_posix()
        for path in shipped_files()
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert expected - packed == set()
    assert {name.partition("/")[0] for name in packed} == {"jaxpaged"}


def test_wheel_imports_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    # The unpacked wheel comes first on the path, before an editable install of the repository.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", IMPORTS]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert all(Path(line).is_relative_to(tmp_path) for line in result.stdout.splitlines())


def test_source_archive_builds_the_same_wheel(source_copy: Path, wheel: Path, tmp_path: Path) -> None:
    archive = build("sdist", source_copy, tmp_path / "sdist")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "unpacked", filter="data")
    [unpacked] = (tmp_path / "unpacked").iterdir()
    rebuilt = build("wheel", unpacked, tmp_path / "wheel")
    names = [set(zipfile.ZipFile(path).namelist()) for path in (wheel, rebuilt)]
    assert names[0] == names[1]


def test_version_and_extras_are_as_documented() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == jaxpaged.__version__
    assert f"[{project['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert {"cuda12", "cuda13", "serve", "train", "notebook", "dev"} <= set(project["optional-dependencies"])
    assert project["scripts"] == {"jaxpaged": "jaxpaged.serve.cli:main"}
