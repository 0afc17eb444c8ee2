"""What the commands share in talking to a terminal: consoles, safe text, numbers for people."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table
from rich.text import Text

# All control characters but tab and newline. A model may produce an escape sequence; the terminal must not run it.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def stdout() -> Console:
    """The console for results; without colours when it is no terminal."""
    return Console(highlight=False)


def stderr() -> Console:
    """The console for messages and progress."""
    return Console(stderr=True, highlight=False)


def harmless(text: str) -> str:
    """The text with control characters made visible."""
    return _CONTROL.sub(lambda match: "\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def write(console: Console, text: str, style: str | None = None) -> None:
    """Writes text as it is, at once: no markup, no wrapping, no new line at the end."""
    if not text:
        return
    console.out(harmless(text) if console.is_terminal else text, style=style, end="", highlight=False)
    console.file.flush()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Shows on a terminal what is being waited for."""
    console = stderr()
    if not console.is_terminal:
        yield
        return
    with console.status(f"[dim]{what}[/]", spinner="dots"):
        yield


def seconds(value: float | None) -> str:
    """A duration: ``1.24 s``, ``38.1 ms``, ``85 µs``; a dash for None."""
    if value is None:
        return "-"
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if value < limit:
            scaled = value * factor
            return f"{scaled:.0f} {unit}" if scaled >= 100 or unit == "µs" else f"{scaled:.1f} {unit}"
    return f"{value:.2f} s"


def size(num_bytes: float) -> str:
    """A number of bytes: ``96.0 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"


def percent(share: float) -> str:
    """A share of one as a percentage."""
    return f"{100 * share:.1f}%"


def facts_table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Two columns: what, and how much."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, expand=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def counted(count: int, noun: str) -> str:
    """``1 block``, ``2 blocks``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def listed(values: Sequence[object], limit: int = 12) -> str:
    """The values with commas, the middle left out when they are many."""
    if len(values) > limit:
        half = limit // 2
        shown = [*map(str, values[:half]), "…", *map(str, values[-half:])]
    else:
        shown = [*map(str, values)]
    return ", ".join(shown)
