"""The tiny checkpoint that the commands run on."""

from pathlib import Path

import pytest

from tests.serve.command_line import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("serve") / "checkpoint")
