"""The README can be trusted: its code runs, its map names every file, its links lead somewhere."""

import re
from pathlib import Path

import pytest

from tests.support.repository import ROOT, SOURCE_FOLDERS, python_files, repository_files

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


@pytest.mark.slow
@pytest.mark.timeout(600)  # compiles some twenty programs
def test_code_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    snippets = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    assert len(snippets) >= 5
    names: dict[str, object] = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"README.md, snippet {number}", "exec"), names)
        assert capsys.readouterr().out.strip(), snippet


def test_map_names_every_file_once() -> None:
    listed = re.findall(rf"^((?:{'|'.join(SOURCE_FOLDERS)})/\S+\.py) +\S", TEXT, re.MULTILINE)
    assert sorted(listed) == sorted(path.as_posix() for path in python_files(*SOURCE_FOLDERS))


def test_links_lead_somewhere() -> None:
    wrong = []
    for path in repository_files():
        if path.suffix == ".md":
            text = (ROOT / path).read_text(encoding="utf-8")
            targets = [(ROOT / path).parent / Path(target) for target in LINK.findall(text)]
            wrong += [f"{path}: {target.name}" for target in targets if not target.exists()]
    assert wrong == []
