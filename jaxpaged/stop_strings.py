"""Finding stop strings in a text that arrives piece by piece."""

from collections import deque
from functools import lru_cache


class StopStrings:
    """An automaton over a set of stop strings; it looks at each character of the text once.

    ``states`` are ints, 0 is the start. For a state, ``next_state(state, char)`` is where a character leads,
    ``matched[state]`` is the length of the longest stop string that ends there (0: none), and
    ``pending[state]`` is how many of the last characters may be the beginning of a stop string and so must
    not be shown yet. Aho and Corasick, "Efficient string matching" (1975).
    """

    def __init__(self, strings: tuple[str, ...]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self.matched = [0]
        depth = [0]
        for string in strings:
            state = 0
            for char in string:
                if char not in self._next[state]:
                    self._next[state][char] = len(self._next)
                    self._next.append({})
                    self._fallback.append(0)
                    self.matched.append(0)
                    depth.append(depth[state] + 1)
                state = self._next[state][char]
            self.matched[state] = len(string)
        self.pending = [0] * len(self._next)
        self._link(depth)

    def _link(self, depth: list[int]) -> None:
        """Breadth first: give each state its fallback, the longest proper suffix that is a state as well."""
        queue = deque([0])
        while queue:
            state = queue.popleft()
            fallback = self._fallback[state]
            self.matched[state] = self.matched[state] or self.matched[fallback]
            # A state without successors is the whole of a stop string, not the beginning of one.
            self.pending[state] = depth[state] if self._next[state] else self.pending[fallback]
            for char, successor in self._next[state].items():
                self._fallback[successor] = self.next_state(fallback, char) if state else 0
                queue.append(successor)

    def next_state(self, state: int, char: str) -> int:
        """Where ``char`` leads from ``state``; amortised over a text, constant time."""
        while state and char not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(char, 0)


@lru_cache(maxsize=64)
def stop_strings(strings: tuple[str, ...]) -> StopStrings:
    """The automaton of some stop strings; requests that share them share it."""
    return StopStrings(strings)
