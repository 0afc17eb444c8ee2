"""Shows texts that grow at the same time one after the other, each as early as can be."""

from collections.abc import Callable, Hashable, Sequence

Write = Callable[[str], None]


class Lanes:
    """Orders pieces of several texts for a medium that only appends.

    The first unfinished text is shown live; pieces of those after it wait for their turn. ``begin`` is called
    with the key of a text before its first piece, ``end`` after its last.

    Invariant: everything before ``_current`` has been shown and is finished; nothing after it has been shown.
    """

    def __init__(
        self,
        keys: Sequence[Hashable],
        write: Write,
        *,
        begin: Callable[[Hashable], None],
        end: Callable[[Hashable], None],
    ) -> None:
        self._keys = list(keys)
        self._write, self._begin, self._end = write, begin, end
        self._waiting: dict[Hashable, list[str]] = {key: [] for key in keys}
        self._finished: set[Hashable] = set()
        self._current = 0
        self._has_begun = False

    def add(self, key: Hashable, text: str) -> None:
        """Takes the next piece of a text."""
        self._waiting[key].append(text)
        if key == self._live:
            self._show()

    def finish(self, key: Hashable) -> None:
        """No more comes of this text."""
        self._finished.add(key)
        while self._live in self._finished:
            self._show()
            self._end(self._keys[self._current])
            self._current += 1
            self._has_begun = False
        if self._live is not None:
            self._show()

    @property
    def _live(self) -> Hashable | None:
        return self._keys[self._current] if self._current < len(self._keys) else None

    def _show(self) -> None:
        key = self._keys[self._current]
        if not self._has_begun:
            self._begin(key)
            self._has_begun = True
        for piece in self._waiting[key]:
            self._write(piece)
        self._waiting[key].clear()
