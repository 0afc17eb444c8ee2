"""``jaxpaged info`` and the description of the machine."""

import json
from pathlib import Path

import pytest

from jaxpaged.serve import environment
from jaxpaged.serve.process_clock import seconds_since_start
from jaxpaged.serve.terminal import counted, harmless, listed, seconds, size
from tests.serve.command_line import run, run_small


def test_facts_of_the_engine(checkpoint: Path) -> None:
    facts = json.loads(run_small("info", checkpoint, "--json").stdout)
    pool = facts["pool"]
    # Keys and values of one head of 16 floats in one layer.
    assert pool["bytes_per_token"] == 2 * 16 * 4
    assert (pool["num_blocks"], pool["num_tokens"]) == (120, 119 * 8)
    assert pool["bytes"] == 120 * 8 * pool["bytes_per_token"]
    assert facts["buckets"][-1] == 32
    assert facts["attention"] in ("numba", "xla")
    assert facts["model"]["architecture"] == "LlamaForCausalLM"
    assert facts["hardware"]["cores"] >= 1


def test_it_reads_well_in_eighty_columns(checkpoint: Path) -> None:
    shown = run_small("info", checkpoint, "--attention", "xla").stdout
    assert max(map(len, shown.splitlines())) <= 80
    for text in ("KV pool", "120 blocks of 8 tokens = 952 tokens", "attention", "xla", "buckets"):
        assert text in shown


def test_version_and_help() -> None:
    assert run("--version").stdout == "jaxpaged 0.1.0\n"
    shown = run("--help").stdout
    assert all(name in shown for name in ("generate", "chat", "bench", "info", "demo"))
    assert "--max-num-batched-tokens" in run("bench", "throughput", "--help").stdout


def test_a_package_outside_of_a_checkout_has_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert environment.commit() is None


def test_the_process_began_a_while_ago() -> None:
    first = seconds_since_start()
    second = seconds_since_start()
    assert first is not None
    assert second is not None
    assert 0.1 < first <= second < 24 * 3600


def test_text_for_people() -> None:
    assert [seconds(value) for value in (None, 85e-6, 0.0381, 0.9, 1.239)] == [
        "-",
        "85 µs",
        "38.1 ms",
        "900 ms",
        "1.24 s",
    ]
    assert [size(value) for value in (12, 98304, 2**20, 3 * 2**30)] == [
        "12 B",
        "96.0 KiB",
        "1.0 MiB",
        "3.00 GiB",
    ]
    assert (counted(1, "block"), counted(1200, "block")) == ("1 block", "1,200 blocks")
    assert listed(range(20), 4) == "0, 1, …, 18, 19"
    assert harmless("a\x1b[2J\tb\r\n\x07") == "a\ufffd[2J\tb\n\ufffd"
