"""The example of a tree search: what it says is the most likely is so, and it branches without computing anew."""

import heapq
import runpy
from typing import Any

import pytest

from jaxpaged import Engine
from jaxpaged.config import EngineConfig
from tests.engine.tiny import dense_logprobs, prompt_of
from tests.support.repository import ROOT
from tests.text.tokenizers_made_here import byte_level

EXAMPLE = runpy.run_path(str(ROOT / "docs" / "examples" / "tree_search.py"))


def most_likely(prompt: list[int], length: int, width: int, count: int) -> list[tuple[float, str]]:
    """By trying everything: log-probabilities and texts, of tokens among the ``width`` most likely ones."""
    ends: dict[str, float] = {}
    pending: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    while pending:
        total, tokens = pending.pop()
        text = byte_level().decode(tokens)
        if len(tokens) == length or "\n" in text:
            line = text.partition("\n")[0]
            ends[line] = max(total, ends.get(line, total))
            continue
        row = dense_logprobs([*prompt, *tokens])[-1]
        pending += [(total + float(row[token]), (*tokens, int(token))) for token in (-row).argsort()[:width]]
    return heapq.nlargest(count, ((total, line) for line, total in ends.items()))


def test_finds_the_most_likely_lines(engine: Engine) -> None:
    prompt = prompt_of(21)
    search: Any = EXAMPLE["TreeSearch"](engine, prompt, num_lines=6, max_tokens=4, num_candidates=5)
    tokens = engine.stats().num_tokens
    found = search.run()
    assert len(found) == 6
    expected = most_likely(prompt, 4, 5, 6)
    assert [line.text for line in found] == [text for _, text in expected]
    assert [line.logprob for line in found] == pytest.approx([total for total, _ in expected], abs=1e-3)
    assert search.num_forks > 0
    assert engine.stats().num_tokens - tokens < 6 * search.num_branches, "of some twenty tokens each"


def test_runs_on_the_embedded_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EngineConfig, "buckets", property(lambda self: (8, 32)))  # programs cost seconds
    EXAMPLE["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert any("self.items.append(item)" in line for line in lines)
    assert "forks" in lines[5]
