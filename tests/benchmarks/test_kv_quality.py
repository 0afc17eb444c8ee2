"""The table of what a quantised cache costs, on a small sample: int8 is within half a percent of bfloat16."""

import pytest

from benchmarks.kv_quality import BASELINE, FORMATS, compare, measure, read_texts, table
from jaxpaged.config import EngineConfig


def test_int8_is_within_half_a_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    # One program for all there is to compute.
    monkeypatch.setattr(EngineConfig, "buckets", property(lambda self: (self.max_num_batched_tokens,)))
    texts = read_texts(num_texts=3, num_tokens=400, num_prompts=2, prompt_tokens=40)
    assert len(texts.scored) == 3
    found = {
        name: measure(FORMATS[name], texts, 4, max_num_seqs=8, max_num_batched_tokens=64)
        for name in (BASELINE, "int8")
    }
    rows = {name: compare(each, found[BASELINE], texts.num_bytes) for name, each in found.items()}
    assert rows[BASELINE]["difference"] == 0
    assert rows[BASELINE]["argmax_agreement"] == rows[BASELINE]["greedy_agreement"] == 1
    assert 0.5 < rows[BASELINE]["bits_per_byte"] < 2
    assert 0 < abs(rows["int8"]["difference"]) < 0.005
    assert 0.95 < rows["int8"]["argmax_agreement"] <= 1
    # Six layers of two heads of 64.
    assert [row["bytes_per_token"] for row in rows.values()] == [6 * 2 * 2 * 128, 6 * 2 * 2 * (64 + 4)]
    assert len(table(rows).splitlines()) == 3
