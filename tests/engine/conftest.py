"""The engine that most tests share: its programs are compiled once in a process."""

from collections.abc import Iterator

import pytest

from jaxpaged import Engine
from tests.engine.tiny import idle, shared_engine


@pytest.fixture
def engine() -> Iterator[Engine]:
    with idle(shared_engine()) as found:
        yield found
