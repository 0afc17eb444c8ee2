"""schemathesis: all that its schema allows or forbids is answered as the schema says, never by a failure inside."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.served import Served

CONFIGURATION = Path(__file__).with_name("schemathesis.toml")
Operation = str  # such as "GET /health"


@pytest.fixture(scope="module")
def scenarios(served: Served, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one run of its own command records, an operation at a time; fails when that has found something."""
    folder = tmp_path_factory.mktemp("schemathesis")
    report = folder / "events.ndjson"
    command = [str(Path(sys.executable).with_name("st")), "--config-file", str(CONFIGURATION), "run"]
    command += [f"{served.url}/openapi.json", "--header", f"Authorization: Bearer {served.key}"]
    command += ["--checks", "all", "--continue-on-failure", "--request-timeout", "120", "--no-color"]
    command += ["--report-ndjson-path", str(report)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    events = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    return [event["ScenarioFinished"]["recorder"] for event in events if "ScenarioFinished" in event]


def answers(scenarios: list[dict[str, Any]]) -> Iterator[tuple[Operation, int]]:
    """Operation and status of each answer."""
    for scenario in scenarios:
        for interaction in scenario.get("interactions", {}).values():
            yield scenario["label"], interaction["response"]["status_code"]


def check_no_answer_is_undeclared_or_malformed(scenarios: list[dict[str, Any]]) -> None:
    failed, names = [], set()
    for scenario in scenarios:
        for checks in scenario.get("checks", {}).values():
            names |= {check["name"] for check in checks}
            failed += [check for check in checks if check["status"] != "success"]
    assert failed == []
    assert names >= {
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
        "negative_data_rejection",
        "ignored_auth",
    }


def check_every_operation_was_asked(scenarios: list[dict[str, Any]], served: Served) -> None:
    schema = json.loads(served.get("/openapi.json"))
    operations = {f"{method.upper()} {path}" for path, found in schema["paths"].items() for method in found}
    assert "POST /v1/chat/completions" in operations
    # What is never answered with success says nothing about that answer.
    assert {operation for operation, status in answers(scenarios) if status == 200} == operations


def check_much_was_refused_and_nothing_failed(scenarios: list[dict[str, Any]]) -> None:
    statuses = Counter(status for _, status in answers(scenarios))
    assert {status for status in statuses if status >= 500} == set()
    assert statuses[400] > 200
    assert min(statuses[status] for status in (200, 401, 404, 405)) > 5
