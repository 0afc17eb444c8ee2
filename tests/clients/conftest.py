"""The running server; without one, nothing is collected here."""

import os

import pytest

from tests.clients.served import VARIABLE, Served

IS_SERVED = VARIABLE in os.environ
collect_ignore_glob = [] if IS_SERVED else ["check_*.py"]


def pytest_report_header() -> str | None:
    return None if IS_SERVED else "tests/clients: skipped, for want of a server; run `make client-test`"


@pytest.fixture(scope="session")
def served() -> Served:
    return Served.from_environment()
