"""``bench serve`` as a command of its own, for tests in this process and in others."""

import signal

import typer
from typer.testing import CliRunner, Result

from jaxpaged.serve.bench_serve.options import BenchServeOptions
from jaxpaged.serve.commands import command
from tests.serve.command_line import WIDTH

app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)


@command(app)
def serve(*, options: BenchServeOptions) -> None:
    """Send a workload to a server."""
    from jaxpaged.serve.bench_serve.run import run_bench_serve

    run_bench_serve(options)


def run(*arguments: object) -> Result:
    """The result of ``jaxpaged bench serve ARGUMENTS``, with no terminal."""
    environment = {"COLUMNS": str(WIDTH), "TERMINAL_WIDTH": str(WIDTH)}
    return CliRunner().invoke(app, list(map(str, arguments)), env=environment)


if __name__ == "__main__":
    # Whoever started the tests in the background of a shell had it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    app()
