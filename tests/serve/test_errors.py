"""A user's mistake is one line on stderr that names it, and exit status 2; nothing else is printed."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.command_line import SMALL, run

MISTAKES = [
    (["generate", ""], "prompt=''"),
    (["generate", "a b " * 400], "max_model_len=512"),
    (["generate", "x", "--temperature", "-1"], "temperature=-1.0"),
    (["generate", "x", "--top-p", "nan"], "top_p=nan"),
    (["generate", "x", "-n", "0"], "n=0"),
    (["generate", "x", "-n", "1000"], "n=1000"),
    (["generate", "x", "--logprobs", "5000"], "logprobs=5000"),
    (["generate", "x", "--stop-token-id", "99999"], "stop_token_ids=99999"),
    (["generate", "x", "--logit-bias", "ten"], "--logit-bias='ten'"),
    (["generate", "x", "--num-blocks", "3", "--max-tokens", "500"], "raise num_blocks"),
    (["generate", "x", "--block-size", "0"], "block_size=0"),
    (["generate", "x", "--dtype", "int8"], "dtype='int8'"),
    (["generate", "x", "--max-model-len", "99999"], "max_model_len=99999"),
    (["generate", "x", "--attention", "nonsense"], "nonsense"),
    (["generate", "-f", "not-there.txt"], "--file=not-there.txt"),
    (["chat", "-n", "2"], "n=2"),
    (["chat", "--system", "be kind"], "no chat template"),
    (["bench", "latency", "not-there.json"], "WORKLOAD=not-there.json"),
]


@pytest.mark.parametrize(("arguments", "named"), MISTAKES, ids=lambda value: str(value)[-40:])
def test_one_line_names_the_mistake(checkpoint: Path, arguments: list[str], named: str) -> None:
    given = {argument.partition("=")[0] for argument in arguments}
    sizes = [size for size in SMALL if size.partition("=")[0] not in given]
    result = run(*arguments, "--model", checkpoint, *sizes, stdin="")
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert named in errors[0]
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_unknown_options_and_commands() -> None:
    for arguments in (["generate", "--tmperature", "1"], ["serv"], ["generate", "--log-level", "loud"]):
        assert run(*arguments).exit_code == 2


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        result = run("info", "--model", folder)
        assert result.exit_code == 2
        assert str(folder) in result.stderr


def test_debug_raises() -> None:
    result = run("generate", "x", "--temperature", "-1", "--debug")
    assert isinstance(result.exception, ValueError)
    assert result.stderr == ""


def subprocess_of(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


MISSING_AT_START = """
import sys
sys.modules[{!r}] = None
sys.argv = ["jaxpaged", "--version"]
from jaxpaged.serve.cli import main
main()
"""
MISSING_LATER = """
import sys
sys.modules[{!r}] = None
from jaxpaged.serve.chat import _line_editor
from jaxpaged.serve.commands import report
try:
    _line_editor()
except ModuleNotFoundError as error:
    sys.exit(report(error))
"""


@pytest.mark.parametrize(
    ("module", "program"),
    [("typer", MISSING_AT_START), ("rich", MISSING_AT_START), ("prompt_toolkit", MISSING_LATER)],
)
def test_a_missing_extra_is_named(module: str, program: str) -> None:
    result = subprocess_of(program.format(module))
    assert result.returncode == 2, result.stderr
    assert module in result.stderr
    assert "pip install 'jaxpaged[serve]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    result = subprocess_of(
        "from jaxpaged.serve.commands import report\nprint('x')\nreport(BrokenPipeError())"
    )
    assert result.returncode == 0
    assert result.stderr == ""


def test_the_command_line_is_there_at_once() -> None:
    program = (
        "import sys\nimport jaxpaged.serve.cli\nprint(sorted({'jax', 'numpy', 'typer', 'rich'} & set(sys.modules)))\n"
        "import jaxpaged.serve.app\nprint(sorted({'jax', 'flax', 'numpy', 'prompt_toolkit'} & set(sys.modules)))"
    )
    assert subprocess_of(program).stdout.split() == ["[]", "[]"]
