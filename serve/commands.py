"""How a function becomes a command: groups of options as one argument, and errors in one line."""

import dataclasses
import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

import typer

from jaxpaged.serve.extras import missing_extra
from jaxpaged.serve.terminal import stderr

# What a user can mend; everything else is a failure of the machine or of this package.
USER_ERRORS = (
    ValueError,
    NotImplementedError,
    MemoryError,
    FileNotFoundError,
    IsADirectoryError,
    PermissionError,
)
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
PANEL = "Diagnostics"


class LogLevel(StrEnum):
    """Severities that ``--log-level`` takes."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """Options of every command."""

    log_level: Annotated[
        LogLevel, typer.Option(help="What to log to stderr.", rich_help_panel=PANEL, case_sensitive=False)
    ] = LogLevel.WARNING
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=PANEL)
    ] = False


def command(
    app: typer.Typer, name: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function as a command of ``app``.

    A parameter whose annotation is a dataclass stands for a group of options: each field is an option, and the
    function gets the group as one object. ``Diagnostics`` is added to every command. Errors end the command
    with one line on stderr: exit status 2 for a user's mistake, 1 for anything else.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        parameters = dict(inspect.signature(function).parameters)
        groups = {n: p.annotation for n, p in parameters.items() if dataclasses.is_dataclass(p.annotation)}

        @functools.wraps(function)
        def run(**given: Any) -> None:
            diagnostics = _collect(Diagnostics, given)
            configure_logging(diagnostics)
            try:
                arguments = {n: _collect(group, given) for n, group in groups.items()}
                function(**given, **arguments)
            except Exception as error:
                if diagnostics.debug or isinstance(error, typer.Exit | typer.Abort):
                    raise
                raise typer.Exit(report(error)) from None

        plain = [p for n, p in parameters.items() if n not in groups]
        options = [o for group in (*groups.values(), Diagnostics) for o in _options_of(group)]
        signature = inspect.Signature(
            [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in plain] + options
        )
        vars(run)["__signature__"] = signature
        run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        del vars(run)["__wrapped__"]
        app.command(name)(run)
        return function

    return register


def _options_of(group: Any) -> list[inspect.Parameter]:
    options = []
    for field in dataclasses.fields(group):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        options.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=field.type
            )
        )
    return options


def _collect(group: Any, given: dict[str, Any]) -> Any:
    """The group's fields, taken out of what the command was given."""
    return group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})


def report(error: BaseException) -> int:
    """Writes an error as one line to stderr; returns the exit status."""
    if isinstance(error, BrokenPipeError):
        # Whoever read our output has what it wanted, as in `jaxpaged info | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    missing = missing_extra(error)
    is_users = missing is not None or isinstance(error, USER_ERRORS)
    text = missing or " ".join(str(error).split()) or type(error).__name__
    if not is_users:
        text = f"{type(error).__name__}: {text} (--debug shows the traceback)"
    console = stderr()
    console.print("[bold red]error:[/] ", end="")
    console.print(text, markup=False, soft_wrap=True)
    return EXIT_USAGE if is_users else EXIT_FAILED


def configure_logging(diagnostics: Diagnostics) -> None:
    """Sends logs to stderr, unless the process already does something with them; tracebacks only with ``--debug``."""
    handler = logging.StreamHandler(sys.stderr)
    if not diagnostics.debug:
        handler.addFilter(_without_traceback)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", handlers=[handler])
    logging.getLogger("jaxpaged").setLevel(diagnostics.log_level.upper())


def _without_traceback(record: logging.LogRecord) -> bool:
    record.exc_info = record.exc_text = None
    return True
