"""aiperf: a short load, of which its report and the server's own counters say the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.served import Served

NUM_REQUESTS, OUTPUT_TOKENS = 24, 16


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def check_load(served: Served, tmp_path: Path, endpoint: str, stream: bool) -> None:
    command = [str(Path(sys.executable).with_name("aiperf")), "profile", "--ui", "none", "--random-seed", "1"]
    command += ["--model", served.model, "--url", served.url, "--api-key", served.key]
    command += ["--tokenizer", served.folder, "--endpoint-type", endpoint, "--artifact-dir", str(tmp_path)]
    command += ["--concurrency", "4", "--request-count", str(NUM_REQUESTS)]
    command += ["--isl", "40", "--osl", str(OUTPUT_TOKENS), "--extra-inputs", "ignore_eos:true"]
    command += ["--streaming"] if stream else []
    # Told to be offline, it looks for folders in the hub's cache as well.
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    served.wait_until_idle()
    before = served.metrics()
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "profile_export_aiperf.json").read_text(encoding="utf-8"))
    assert report["is_complete"]
    assert report["error_summary"] == []
    assert report["request_error_rate"]["avg"] == 0
    found = {
        "request_success": report["request_count"]["avg"],
        "prompt_tokens": report["total_usage_prompt_tokens"]["avg"],
        "generation_tokens": report["total_usage_completion_tokens"]["avg"],
    }
    assert found == served.counted_since(before)
    assert found["request_success"] == NUM_REQUESTS
    assert found["generation_tokens"] == NUM_REQUESTS * OUTPUT_TOKENS
    if stream:
        first, latency = report["time_to_first_token"], report["request_latency"]
        assert 0 < first["avg"] < latency["avg"]
