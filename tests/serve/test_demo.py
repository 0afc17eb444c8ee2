"""``jaxpaged demo``, and both ways in which it shows texts."""

import io
import re
from pathlib import Path

from rich.console import Console

from jaxpaged.serve.demo_view import Listing, Panels, block_picture, view_for
from tests.serve.command_line import run, run_small

PROMPTS = {"a": "def f(", "b": "class A:\n    def "}


def test_it_runs_and_counts(checkpoint: Path) -> None:
    shown = run_small("demo", checkpoint, "--max-tokens", "4").stdout
    assert re.search(r"first token\W+[\d.]+ \w+ after the start of the process", shown)
    hits, found = map(int, re.search(r"(\d+) of (\d+) prompt tokens were in the cache", shown).groups())  # type: ignore[union-attr]
    assert 0 < hits < found
    held, mapped = map(int, re.search(r"(\d+) blocks instead of (\d+)", shown).groups())  # type: ignore[union-attr]
    assert held < mapped
    assert all(f"completion {index}" in shown for index in range(4))
    assert max(len(line) for line in shown.splitlines() if line.startswith("│")) <= 80


def test_it_runs_on_the_embedded_model() -> None:
    result = run("demo", "--max-tokens", "4", "--num-blocks", "64")
    assert result.exit_code == 0, result.output
    assert "the embedded model" in result.stdout
    assert "import" in result.stdout


def terminal(**size: int) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", **size)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def test_panels_fit_the_window_while_they_grow_and_end_whole() -> None:
    console = terminal(width=80, height=12)
    view = view_for(console, PROMPTS)
    assert isinstance(view, Panels)
    text = "\n".join(f"line {i}" for i in range(30)) + "\n" + "word " * 40
    with view:
        view.add("a", text)
        assert "line 0" not in written(console)
        view.finish("a")
        view.add("b", "\x1b[2Jx")
    shown = written(console)
    assert "line 0 " in shown
    assert "\ufffd[2Jx" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_narrow_terminals_and_pipes_get_a_list() -> None:
    assert isinstance(view_for(terminal(width=40, height=20), PROMPTS), Listing)
    console = Console(file=io.StringIO(), width=80)
    view = view_for(console, PROMPTS)
    with view:
        view.add("b", "g(self)")
        view.add("a", "x):")
        view.finish("b")
        view.finish("a")
    shown = written(console)
    assert shown.index("def f(x):") < shown.index("class A:\n    def g(self)")


def test_shared_blocks_stand_out() -> None:
    lines = list(block_picture([[1, 2, 3], [1, 2, 4]]))
    assert [line.plain for line in lines] == ["  completion 0    1   2   3", "  completion 1    1   2   4"]
    cyan = [
        line.plain[span.start : span.end].strip()
        for line in lines
        for span in line.spans
        if "cyan" in str(span.style)
    ]
    assert cyan == ["1", "2", "1", "2"]
