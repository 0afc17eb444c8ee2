"""Compiles cases for GPUs that are not there and prints a JSON object for each.

    python -m tests.gpu_compile.run --target h200 --cases 'attention-decode-*' --keep some/folder

Every case is compiled in a process of its own: one that aborts, hangs or runs out of memory is reported as the failure
of its case, and the others go on. The exit status is 1 if any case has problems. With ``--keep``, PTX, ptxas output,
Mosaic's modules and the optimised HLO of every case stay in a folder ``<target>/<case>`` there.
"""

import argparse
import fnmatch
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tests.gpu_compile import expectations, worker
from tests.gpu_compile.cases import CASES, ON_REQUEST, find_case
from tests.gpu_compile.targets import TARGETS, missing_reason

TIMEOUT = 240.0  # seconds of one case; the slowest known takes some twenty

# Compilation is what is wanted here, so nothing may come from a cache; the GPUs are not there, so jax runs on the CPU.
# As strict as the other tests, also from the command line.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
}


def select(patterns: list[str], target: str) -> list[str]:
    """Names of the cases of a target that fit any pattern; without patterns those of the tests."""
    if not patterns:
        return [case.name for case in CASES.values() if target in case.targets]
    fitting = [
        case
        for case in (CASES | ON_REQUEST).values()
        if any(fnmatch.fnmatchcase(case.name, p) for p in patterns)
    ]
    return [case.name for case in fitting if target in case.targets]


def run_case(target: str, name: str, folder: Path) -> dict[str, Any]:
    """The report of one case, compiled in a new process that leaves its files in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    context = multiprocessing.get_context("forkserver")
    started = time.perf_counter()
    process = context.Process(target=worker.compile_into, args=(str(folder), target, name))
    process.start()
    process.join(TIMEOUT)
    report: dict[str, Any]
    if process.is_alive():
        process.kill()
        process.join()
        report = {"status": "timeout", "message": f"not done after {TIMEOUT:.0f} s\n{_last_lines(folder)}"}
    elif not (folder / worker.REPORT).exists():
        code = process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        report = {"status": "crashed", "message": f"the process ended by {how}\n{_last_lines(folder)}"}
    else:
        report = json.loads((folder / worker.REPORT).read_text(encoding="utf-8"))
    report.setdefault("seconds", round(time.perf_counter() - started, 2))
    case = find_case(name)
    for kernel in report.get("kernels", ()):
        kernel["blocks_per_sm"] = expectations.blocks_per_sm(kernel, TARGETS[target])
    found = expectations.problems(report, case.expects, TARGETS[target], may_refuse=case.may_refuse)
    return {"target": target, "case": name, **report, "problems": found}


def run_cases(pairs: list[tuple[str, str]], jobs: int, keep: Path | None) -> Iterator[dict[str, Any]]:
    """Reports of (target, case) pairs, ``jobs`` at a time, as they are done."""
    os.environ.update(ENVIRONMENT)
    # The server imports everything once, before any thread or device exists, and forks a process for each case.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.gpu_compile.worker"])
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(jobs) as threads:
        root = keep or Path(scratch)
        futures = [threads.submit(run_case, target, name, root / target / name) for target, name in pairs]
        for future in as_completed(futures):
            yield future.result()


def _last_lines(folder: Path, count: int = 15) -> str:
    log = folder / worker.LOG
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return "\n".join(text.splitlines()[-count:])


def main() -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", nargs="+", default=["h200"], choices=[*TARGETS, "all"])
    parser.add_argument("--cases", nargs="+", default=[], help="names, or patterns with *; all by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cases at a time")
    parser.add_argument("--keep", type=Path, help="folder for what the compilers write")
    parser.add_argument("--list", action="store_true", help="print the names and compile nothing")
    options = parser.parse_args()
    targets = list(TARGETS) if "all" in options.target else options.target
    pairs = [(target, name) for target in targets for name in select(options.cases, target)]
    if not pairs:
        parser.error(f"no case of {', '.join(targets)} fits {options.cases}")
    if options.list:
        print("\n".join(f"{target} {name}" for target, name in pairs))
        return 0
    if reason := missing_reason():
        parser.error(reason)
    failed = 0
    for report in run_cases(pairs, options.jobs, options.keep):
        print(json.dumps(report), flush=True)
        failed += bool(report["problems"])
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
