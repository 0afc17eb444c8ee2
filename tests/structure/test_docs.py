"""The guide to memory can be trusted: its code runs."""

import re

import pytest

from tests.support.repository import ROOT


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_code_of_the_memory_guide_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(snippets) >= 5
    names: dict[str, object] = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"docs/memory.md, snippet {number}", "exec"), names)
    shown = capsys.readouterr().out
    assert "trunk" in shown
    assert "branch" in shown
