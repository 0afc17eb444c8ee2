"""Every case compiles for its GPUs, without spills, within their memory, and without a copy of the pool."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from tests.gpu_compile.cases import CASES
from tests.gpu_compile.targets import TARGETS, missing_reason
from tests.support.repository import ROOT

Report = dict[str, Any]
PAIRS = [(target, case) for target in TARGETS for case, c in CASES.items() if target in c.targets]

# The first test of a target waits for all of its cases.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="session")
def report_of(request: pytest.FixtureRequest) -> Callable[[str, str], Report]:
    """The report of a target and a case; one subprocess compiles all of a target's that this run has tests of."""
    if reason := missing_reason():
        pytest.skip(reason)
    wanted: dict[str, list[str]] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and "report_of" in item.fixturenames:
            params = item.callspec.params
            named = [params[name] for name in ("case", "base") if name in params]
            wanted.setdefault(params["target"], []).extend(named)
    compiled = cache(lambda target: run(target, wanted[target]))
    return lambda target, case: compiled(target)[case]


def run(target: str, cases: list[str]) -> dict[str, Report]:
    """What ``python -m tests.gpu_compile.run`` reports."""
    command = [sys.executable, "-m", "tests.gpu_compile.run", "--target", target, "--cases", *cases]
    command += ["--jobs", str(os.cpu_count() or 1)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode in (0, 1), result.stderr
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    return {report["case"]: report for report in reports}


@pytest.mark.parametrize(("target", "case"), PAIRS, ids=[f"{target}-{case}" for target, case in PAIRS])
def test_compiles(report_of: Callable[[str, str], Report], target: str, case: str) -> None:
    report = report_of(target, case)
    assert report["problems"] == [], "\n".join(report["problems"])
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


@pytest.mark.parametrize(("target", "case"), FOUND, ids=[f"{target}-{case}" for target, case in FOUND])
def test_planted_faults_are_found(report_of: Callable[[str, str], Report], target: str, case: str) -> None:
    problems = report_of(target, case)["problems"]
    assert any(FOUND[target, case] in problem for problem in problems), problems


@pytest.mark.parametrize("target", ["h200"])
@pytest.mark.parametrize("base", ["step-deterministic-8"])
@pytest.mark.parametrize(
    "case", ["step-deterministic-512", "step-deterministic-scan", "planted-inlined-tile"]
)
def test_deterministic_steps_of_any_size_have_the_same_products(
    report_of: Callable[[str, str], Report], target: str, case: str, base: str
) -> None:
    """With the same things fused into them, so that XLA chooses the same kernels. And that this could be missed."""
    found, expected = (set(report_of(target, name)["products"]) for name in (case, base))
    assert len(expected) >= 5
    # The scan leaves out the products of prompt log-probabilities; they are the same as those of sampling.
    assert (found == expected) is (case != "planted-inlined-tile")
