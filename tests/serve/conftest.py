"""The tiny checkpoint that the commands run on."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.command_line import make_checkpoint
from tests.serve.live_server import LiveServer, live_server


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("serve") / "checkpoint")


@pytest.fixture(scope="module")
def served() -> Iterator[LiveServer]:
    """A server over a tiny engine, shared by the tests of a file."""
    with live_server() as live:
        yield live


@pytest.fixture
def live(served: LiveServer) -> Iterator[LiveServer]:
    """The same, and the check that a test leaves nothing behind."""
    yield served
    served.settle()
