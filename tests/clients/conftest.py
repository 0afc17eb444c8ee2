"""The running server."""

import pytest

from tests.clients.served import Served


@pytest.fixture(scope="session")
def served() -> Served:
    return Served.from_environment()
