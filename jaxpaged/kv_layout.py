"""Which layers share block tables: groups of layers over one pool.

Layers that attend to everything need all blocks of a sequence, layers with a sliding window only the last few. So
each kind of layer has block tables of its own. A block holds the keys and values of some tokens in one group of
layers, all groups have the same number of layers of each dtype, and so any block can serve any group: one pool, one
allocator, and no memory that is set aside for one kind and idle (the idea of vLLM's hybrid KV cache manager).
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# Bytes that a block may have too many, as a share of all: rounding to groups of one size costs memory, many groups
# cost tables.
MAX_WASTE = 1 / 8


@dataclass(frozen=True)
class KVLayout:
    """The groups of a model's layers.

    Attributes:
      windows: for each group its sliding window in tokens, None for full attention.
      places: for each layer its group, and its index among the layers of a block.
      dtypes: of each layer of a block: layers of the model that have one index in several groups have one dtype.
    """

    windows: tuple[int | None, ...]
    places: tuple[tuple[int, int], ...]
    dtypes: tuple[str, ...]

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.windows)

    @property
    def layers_per_block(self) -> int:
        """L of the pool: layers whose keys and values one block holds."""
        return len(self.dtypes)

    @classmethod
    def of(
        cls,
        sliding_windows: Sequence[int | None],
        max_model_len: int,
        dtypes: Sequence[str] | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> "KVLayout":
        """The layout for layers with these windows; one that no sequence can outgrow is no window.

        Args:
          sliding_windows: of each layer.
          max_model_len: tokens of the longest sequence.
          dtypes: of each layer; None where it does not matter.
          sizes: for each dtype the bytes that a token takes in a layer; None where all take the same.

        Layers of several dtypes whose windows go by their dtypes waste memory, because every group has room for all
        dtypes: such a layout may have more than ``MAX_WASTE``.
        """
        windows = [None if w is None or w >= max_model_len else w for w in sliding_windows]
        dtypes = ["auto"] * len(windows) if dtypes is None else dtypes
        kinds = list(zip(windows, dtypes, strict=True))
        counts = _group_sizes(Counter(kinds), sizes or dict.fromkeys(dtypes, 1))
        first = dict(zip(counts, itertools.accumulate(counts.values(), initial=0), strict=False))
        groups: list[tuple[int | None, int]] = []
        seen: Counter[tuple[int | None, str]] = Counter()
        places = []
        for kind in kinds:
            window, dtype = kind
            turn, index = divmod(seen[kind], counts[dtype])
            seen[kind] += 1
            if (window, turn) not in groups:
                groups.append((window, turn))
            places.append((groups.index((window, turn)), first[dtype] + index))
        of_block = tuple(dtype for dtype, count in counts.items() for _ in range(count))
        return cls(tuple(window for window, _ in groups), tuple(places), of_block)


def _group_sizes(counts: Mapping[tuple[int | None, str], int], sizes: Mapping[str, int]) -> dict[str, int]:
    """Layers of a group in each dtype: the fewest groups that do not waste too much.

    Args:
      counts: how many layers there are of each window and dtype.
      sizes: what a layer of a dtype takes.
    """
    windows = list(dict.fromkeys(window for window, _ in counts))
    of_dtype = {dtype: {w: n for (w, d), n in counts.items() if d == dtype} for _, dtype in counts}
    if len(windows) == 1:
        return {dtype: found[windows[0]] for dtype, found in of_dtype.items()}
    needed = sum(count * sizes[dtype] for (_, dtype), count in counts.items())

    def cost(chosen: Iterable[int]) -> tuple[bool, int, int]:
        per_window = dict.fromkeys(windows, 0)
        for size, found in zip(chosen, of_dtype.values(), strict=True):
            for window, count in found.items():
                per_window[window] = max(per_window[window], -(-count // size))
        num_groups = sum(per_window.values())
        block = sum(size * sizes[dtype] for size, dtype in zip(chosen, of_dtype, strict=True))
        if num_groups * block <= (1 + MAX_WASTE) * needed:
            return (False, num_groups, block)
        return (True, num_groups * block, num_groups)

    choices = itertools.product(*(range(1, max(found.values()) + 1) for found in of_dtype.values()))
    return dict(zip(of_dtype, min(choices, key=cost), strict=True))
