"""How the demo shows texts that grow together: side by side on a terminal, one after the other elsewhere."""

import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.syntax import Syntax
from rich.text import Text

from jaxpaged.serve.lanes import Lanes
from jaxpaged.serve.terminal import harmless, write

REFRESH_SECONDS = 1 / 12
SIDE_BY_SIDE_WIDTH = 72  # below it, two columns of code are too narrow to read


class View(Protocol):
    """Texts by key; ``add`` appends to one of them."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def add(self, key: Hashable, text: str) -> None:
        """The next piece of a text."""

    def finish(self, key: Hashable) -> None:
        """No more comes of it."""


def view_for(console: Console, prompts: Mapping[Hashable, str]) -> View:
    """The view that suits the console."""
    if console.is_terminal and console.width >= SIDE_BY_SIDE_WIDTH:
        return Panels(console, prompts)
    return Listing(console, prompts)


class Panels:
    """A panel for each text, two in a row, redrawn while they grow."""

    def __init__(self, console: Console, prompts: Mapping[Hashable, str]) -> None:
        self._console, self._prompts = console, prompts
        self._texts = dict.fromkeys(prompts, "")
        self._done: set[Hashable] = set()
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="crop")
        self._drawn = 0.0

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.update(self._draw(whole=True), refresh=True)
        self._live.__exit__(kind, error, trace)

    def add(self, key: Hashable, text: str) -> None:
        """Draws at once the first time, then a few times a second."""
        self._texts[key] += text
        now = time.monotonic()
        if now - self._drawn >= REFRESH_SECONDS:
            self._drawn = now
            self._live.update(self._draw(), refresh=True)

    def finish(self, key: Hashable) -> None:
        """Its frame changes colour."""
        self._done.add(key)

    def _draw(self, *, whole: bool = False) -> Columns:
        # While it grows the picture has to fit the window: the end of each text is shown.
        rows = -(-len(self._texts) // 2)
        height = 10_000 if whole else max(3, (self._console.height - 2) // rows - 2)
        width = self._console.width // 2 - 1
        panels = [self._panel(key, width, height) for key in self._texts]
        return Columns(panels, width=width, padding=(0, 1, 0, 0))

    def _panel(self, key: Hashable, width: int, height: int) -> Panel:
        code = coloured(self._prompts[key], self._texts[key])
        lines = code.wrap(self._console, width - 4)
        border = "green" if key in self._done else "dim"
        return Panel(Group(*lines[-height:]), border_style=border, width=width, padding=(0, 1))


class Listing:
    """One text after the other, each as early as can be; nothing is ever redrawn."""

    def __init__(self, console: Console, prompts: Mapping[Hashable, str]) -> None:
        self._console, self._prompts = console, prompts
        self._lanes = Lanes(list(prompts), self._write, begin=self._begin, end=self._end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def add(self, key: Hashable, text: str) -> None:
        """Shown when it is the turn of its text."""
        self._lanes.add(key, text)

    def finish(self, key: Hashable) -> None:
        """The next text may be shown."""
        self._lanes.finish(key)

    def _write(self, text: str) -> None:
        write(self._console, text)

    def _begin(self, key: Hashable) -> None:
        write(self._console, self._prompts[key], style="bold")

    def _end(self, key: Hashable) -> None:
        self._console.print(f"\n{'-' * 40}", style="dim")


def coloured(prompt: str, completion: str) -> Text:
    """Python in colours, the prompt in bold."""
    code = harmless(prompt + completion)
    text = Syntax("", "python", theme="ansi_dark", background_color="default").highlight(code)
    text.rstrip()
    text.no_wrap, text.overflow = False, "fold"
    text.stylize("bold", 0, len(harmless(prompt)))
    return text


def block_picture(tables: Sequence[Sequence[int]]) -> Iterable[Text]:
    """A line for each block table; blocks that several tables hold stand out."""
    holders: dict[int, int] = {}
    for table in tables:
        for block in table:
            holders[block] = holders.get(block, 0) + 1
    for index, table in enumerate(tables):
        line = Text(f"  completion {index} ", style="dim")
        for block in table:
            line.append(f"{block:>4}", style="bold cyan" if holders[block] > 1 else "not dim")
        yield line
