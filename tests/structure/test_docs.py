"""The guides can be trusted: their code runs."""

import re

import pytest

from tests.support.repository import ROOT


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("guide", "count", "shown"), [("memory", 5, ("trunk", "branch")), ("serving", 2, ("tokens", "steps"))]
)
def test_the_code_of_a_guide_runs(
    capsys: pytest.CaptureFixture[str], guide: str, count: int, shown: tuple[str, ...]
) -> None:
    text = (ROOT / "docs" / f"{guide}.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(snippets) >= count
    names: dict[str, object] = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"docs/{guide}.md, snippet {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert all(word in printed for word in shown)
