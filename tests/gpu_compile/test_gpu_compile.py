"""Every case compiles for its GPUs, without spills, within their memory, and without a copy of the pool."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.gpu_compile.cases import CASES
from tests.gpu_compile.targets import TARGETS, missing_reason
from tests.support.repository import ROOT

Reports = dict[str, dict[str, Any]]
PAIRS = [(target, case) for target in TARGETS for case, c in CASES.items() if target in c.targets]

pytestmark = pytest.mark.timeout(1200)  # the first test of a target waits for all of its cases


@pytest.fixture(scope="session")
def reports_of(request: pytest.FixtureRequest) -> Callable[[str], Reports]:
    """Reports of a target by case, compiled by one subprocess for those cases that this run has tests of."""
    if reason := missing_reason():
        pytest.skip(reason)
    wanted: dict[str, list[str]] = {}
    for item in request.session.items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if isinstance(item, pytest.Function) and item.function is test_compiles:
            wanted.setdefault(parameters["target"], []).append(parameters["case"])
    done: dict[str, Reports] = {}

    def reports(target: str) -> Reports:
        if target not in done:
            done[target] = run(target, wanted[target])
        return done[target]

    return reports


def run(target: str, cases: list[str]) -> Reports:
    """What ``python -m tests.gpu_compile.run`` reports."""
    command = [sys.executable, "-m", "tests.gpu_compile.run", "--target", target, "--cases", *cases]
    command += ["--jobs", str(os.cpu_count() or 1)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode in (0, 1), result.stderr
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    return {report["case"]: report for report in reports}


@pytest.mark.parametrize(("target", "case"), PAIRS, ids=[f"{target}-{case}" for target, case in PAIRS])
def test_compiles(reports_of: Callable[[str], Reports], target: str, case: str) -> None:
    report = reports_of(target)[case]
    assert report["problems"] == []
    if report["status"] in ("unavailable", "refused"):
        pytest.skip(report["message"])


FOUND = {
    ("h200", "planted-spill"): "spills",
    ("a100", "planted-spill"): "spills",
    ("a40", "planted-too-much-smem"): "bytes of shared memory, a block may have 101376",
    ("a100", "planted-wrong-gpu"): "only supported Hopper and newer",
    ("h200", "planted-abort"): "the process ended by SIGABRT",
    ("h200", "planted-no-wgmma"): "no wgmma.mma_async in any kernel",
    ("h200", "planted-no-donation"): "the size of the pool is written by: copy",
    ("h200", "planted-late-read"): "bytes of temporaries",
}


@pytest.mark.parametrize(("target", "case"), FOUND, ids=lambda value: value)
def test_planted_faults_are_found(target: str, case: str) -> None:
    if reason := missing_reason():
        pytest.skip(reason)
    problems = run(target, [case])[case]["problems"]
    assert any(FOUND[target, case] in problem for problem in problems), problems
