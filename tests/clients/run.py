"""Runs the checks of all clients against one server: ``python -m tests.clients.run [CLIENT ...]``.

Exit status 1 if a check or the server failed, or if no client could be installed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from tests.clients.environments import CLIENTS, Client, InstallError, prepare
from tests.clients.served import Served
from tests.clients.server import ServerProcess
from tests.support.repository import ROOT

CHECKS = "tests/clients"
CLIENT_TIMEOUT = 1800.0
# Nothing is fetched and nobody is told; a client's own plugins for pytest are not what is tested.
QUIET = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
}
COLUMNS = ("client", "version", "checks", "passed", "seconds")


@dataclass
class Row:
    """A line of the table; ``problem`` is why it is no success, ``skipped`` that it could not be tried."""

    client: str
    version: str = ""
    num_checks: int = 0
    num_passed: int = 0
    seconds: float = 0.0
    problem: str = ""
    skipped: bool = False

    def cells(self) -> tuple[str, ...]:
        """Texts of the columns."""
        numbers = (str(self.num_checks), str(self.num_passed), f"{self.seconds:.0f}")
        return (self.client, self.version, *(("", "", "") if self.skipped else numbers))


def check(client: Client, version: str, served: Served, folder: Path) -> Row:
    """Runs the checks of a client."""
    report = folder / f"{client.name}.xml"
    command = [str(client.python), "-m", "pytest", "--quiet", f"{CHECKS}/{client.checks}"]
    command += [f"--junitxml={report}", f"--basetemp={folder / client.name}"]
    begun = time.monotonic()
    row = Row(client.name, version)
    try:
        environment = os.environ | QUIET | served.environment()
        result = subprocess.run(command, cwd=ROOT, env=environment, timeout=CLIENT_TIMEOUT, check=False)
        row.problem = "" if result.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        row.problem = f"did not end within {CLIENT_TIMEOUT:g} s"
    row.seconds = time.monotonic() - begun
    if report.is_file():
        suites = ElementTree.parse(report).getroot().iter("testsuite")
        counts = [{name: int(value) for name, value in suite.items() if value.isdigit()} for suite in suites]
        row.num_checks = sum(one["tests"] for one in counts)
        wrong = sum(one[name] for one in counts for name in ("failures", "errors", "skipped"))
        row.num_passed = row.num_checks - wrong
    return row


def check_all(chosen: list[Client], folder: Path) -> list[Row]:
    """A row for each client, and one for the server."""
    versions, rows = {}, []
    for client in chosen:
        try:
            versions[client] = prepare(client)
        except InstallError as error:
            rows.append(Row(client.name, problem=f"could not be installed: {error}", skipped=True))
    if not versions:
        return rows
    server = ServerProcess(folder)
    try:
        print("Starting the server (the first time compiles for a minute or two)", flush=True)
        served = server.wait_until_ready()
        if any(client.checks == "check_lm_eval.py" for client in versions):
            subprocess.run([sys.executable, "-m", "tests.clients.engine_scores", served.scores], check=True)
        for client, version in versions.items():
            print(f"\n{client.name} {version}", flush=True)
            rows.append(check(client, version, served, folder))
        problems = server.problems(served)
        rows.append(Row("the server afterwards", "", 1, int(not problems), 0.0, "; ".join(problems)))
    finally:
        server.kill()
    return rows


def table(rows: list[Row]) -> str:
    """All rows, under a line of titles; what is wrong with one behind it."""
    notes = ["", *(f"{'skipped: ' if row.skipped else ''}{row.problem}" for row in rows)]
    lines = [COLUMNS, *(row.cells() for row in rows)]
    columns = []
    for place, column in enumerate(zip(*lines, strict=True)):
        width = max(map(len, column))
        columns.append([cell.ljust(width) if place < 2 else cell.rjust(width) for cell in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, notes, strict=True))


def main() -> int:
    """Returns the exit status."""
    names = [client.name for client in CLIENTS]
    parser = argparse.ArgumentParser(description="Runs clients against `jaxpaged serve`.")
    parser.add_argument("client", nargs="*", help=f"default: all of {', '.join(names)}")
    wanted = parser.parse_args().client or names
    if unknown := set(wanted) - set(names):
        parser.error(f"no such client: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    with tempfile.TemporaryDirectory() as folder:
        rows = check_all([client for client in CLIENTS if client.name in wanted], Path(folder))
    print("\n" + table(rows))
    failed = [row for row in rows if row.problem and not row.skipped]
    return int(bool(failed) or all(row.skipped for row in rows))


if __name__ == "__main__":
    sys.exit(main())
