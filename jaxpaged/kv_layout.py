"""Which layers share block tables: groups of layers over one pool.

Layers that attend to everything need all blocks of a sequence, layers with a sliding window only the last few. So
each kind of layer has block tables of its own. A block holds the keys and values of some tokens in one group of
layers, all groups have the same number of layers, and so any block can serve any group: one pool, one allocator, and
no memory that is set aside for one kind and idle (the idea of vLLM's hybrid KV cache manager).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

# Layers that a block may have too many, as a share of all: rounding to groups of one size costs memory, many groups
# cost tables.
MAX_WASTE = 1 / 8


@dataclass(frozen=True)
class KVLayout:
    """The groups of a model's layers.

    Attributes:
      windows: for each group its sliding window in tokens, None for full attention.
      places: for each layer its group, and its index among the layers of a block.
    """

    windows: tuple[int | None, ...]
    places: tuple[tuple[int, int], ...]

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.windows)

    @cached_property
    def layers_per_block(self) -> int:
        """L of the pool: layers whose keys and values one block holds."""
        return 1 + max(index for _, index in self.places)

    @classmethod
    def of(cls, sliding_windows: Sequence[int | None], max_model_len: int) -> "KVLayout":
        """The layout for layers with these windows; one that no sequence can outgrow is no window."""
        windows = [None if w is None or w >= max_model_len else w for w in sliding_windows]
        size = _group_size(list(Counter(windows).values()))
        groups: list[int | None] = []
        last: dict[int | None, tuple[int, int]] = {}
        places = []
        for window in windows:
            group, index = last.get(window, (-1, size - 1))
            if index == size - 1:
                group, index = len(groups), -1
                groups.append(window)
            last[window] = (group, index + 1)
            places.append(last[window])
        return cls(tuple(groups), tuple(places))


def _group_size(counts: list[int]) -> int:
    """Layers of a group: the fewest groups that do not waste too much, given how many layers of each kind there are."""
    if len(counts) == 1:
        return counts[0]
    sizes = range(1, max(counts) + 1)
    num_groups = {size: sum(-(-count // size) for count in counts) for size in sizes}
    fitting = [size for size in sizes if num_groups[size] * size <= (1 + MAX_WASTE) * sum(counts)]
    return min(fitting, key=lambda size: (num_groups[size], size))  # size 1 wastes nothing
