"""The guides can be trusted: their code runs, and prints what they say."""

import re
import runpy

import pytest

from tests.support.repository import ROOT

# A snippet, and what it prints if a block of text comes right after it.
SNIPPET = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("guide", "count", "shown"),
    [
        ("memory", 5, ("trunk", "branch")),
        ("serving", 2, ("tokens", "steps")),
        ("kernels", 8, ("right: True",)),
    ],
)
def test_the_code_of_a_guide_runs(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    guide: str,
    count: int,
    shown: tuple[str, ...],
) -> None:
    from jaxpaged.pallas_kernels.paged_attention.api import IMPLEMENTATIONS

    monkeypatch.setitem(
        IMPLEMENTATIONS, "dense", lambda *_: None
    )  # undoes what the guide registers under that name
    text = (ROOT / "docs" / f"{guide}.md").read_text(encoding="utf-8")
    snippets = SNIPPET.findall(text)
    assert len(snippets) >= count
    names: dict[str, object] = {}
    printed = ""
    for number, (snippet, said) in enumerate(snippets):
        exec(compile(snippet, f"docs/{guide}.md, snippet {number}", "exec"), names)
        prints = capsys.readouterr().out
        assert not said or prints == said, f"snippet {number}"
        printed += prints
    assert all(word in printed for word in shown)


def test_the_rooflines_are_those_of_the_script_that_draws_them() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    script = runpy.run_path(str(ROOT / "docs" / "kernel_pictures.py"))
    lines = [line for line in text.splitlines() if line in script["table"]()]
    assert lines == script["table"]()
    words = " ".join(text.split())
    for group in (1, 4, 8):
        assert re.search(rf"\b{script['crossing'](group)}( tokens on)? with G = {group}\b", words), group
    assert f"{script['BALANCE']:.0f} FLOP a byte" in text
    assert all((ROOT / "docs" / f"kernels_{name}.png").is_file() for name in ("layout", "roofline"))
