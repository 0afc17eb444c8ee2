"""inference-perf: a short load at a constant rate, of which its report and the server's counters say the same."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clients.served import Served

RATE, SECONDS = 8, 3


def configuration(served: Served, folder: Path, streaming: bool) -> dict[str, Any]:
    return {
        "load": {"type": "constant", "stages": [{"rate": RATE, "duration": SECONDS}], "num_workers": 1},
        "api": {"type": "completion", "streaming": streaming},
        "server": {
            "type": "vllm",
            "model_name": served.model,
            "base_url": served.url,
            "api_key": served.key,
            "ignore_eos": True,
        },
        "tokenizer": {"pretrained_model_name_or_path": served.folder},
        "data": {
            "type": "random",
            "input_distribution": {"min": 20, "max": 40, "mean": 30, "std_dev": 5, "total_count": 40},
            "output_distribution": {"min": 8, "max": 16, "mean": 12, "std_dev": 2, "total_count": 40},
        },
        "report": {"request_lifecycle": {"summary": True, "per_stage": True, "per_request": True}},
        "storage": {"local_storage": {"path": str(folder / "report")}},
    }


@pytest.mark.parametrize("streaming", [True, False], ids=["streamed", "whole"])
def check_load(served: Served, tmp_path: Path, streaming: bool) -> None:
    file = tmp_path / "load.yaml"
    # YAML reads JSON.
    file.write_text(json.dumps(configuration(served, tmp_path, streaming)), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("inference-perf")), "-c", str(file)]
    served.wait_until_idle()
    before = served.metrics()
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    file = tmp_path / "report" / "summary_lifecycle_metrics.json"
    summary = json.loads(file.read_text(encoding="utf-8"))
    assert summary["failures"]["count"] == 0
    done = summary["successes"]
    # What it makes of the streamed texts may differ from the tokens that were sampled: "token_count_mismatches".
    assert done["client_fallback_requests"] == {"prompt": 0, "output": 0}
    found = {
        "request_success": done["count"],
        "prompt_tokens": done["prompt_tokens"]["total"],
        "generation_tokens": done["output_tokens"]["total"],
    }
    assert found == served.counted_since(before)
    assert found["request_success"] == RATE * SECONDS
    if streaming:
        assert 0 < done["latency"]["time_to_first_token"]["mean"] < done["latency"]["request_latency"]["mean"]
