"""Few combinations of many settings in which every two values of two different settings meet."""

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any


def pairwise(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """A greedy covering array of strength two; the first combination has the first value of every axis.

    Each step takes a pair that has not met and gives the other axes, one after the other, the value that meets the most
    new partners (Cohen et al. 1997, "The AETG system").
    """
    names = list(axes)
    left = {
        ((a, x), (b, y))
        for a, b in combinations(names, 2)
        for x, y in product(range(len(axes[a])), range(len(axes[b])))
    }
    chosen: list[dict[str, int]] = []
    while left:
        first = min(left, key=lambda pair: [pair[0][1] + pair[1][1], pair]) if chosen else None
        row = dict(first) if first else dict.fromkeys(names, 0)
        for name in names:
            if name not in row:
                row[name] = max(range(len(axes[name])), key=lambda v: (_gain(row, name, v, names, left), -v))
        chosen.append(row)
        left -= set(combinations([(name, row[name]) for name in names], 2))
    return [{name: axes[name][row[name]] for name in names} for row in chosen]


def _gain(row: dict[str, int], name: str, value: int, names: list[str], left: set[Any]) -> int:
    """How many pairs that have not met a value adds to a partial row."""
    at = names.index(name)
    count = 0
    for other, chosen in row.items():
        pair = (
            ((other, chosen), (name, value)) if names.index(other) < at else ((name, value), (other, chosen))
        )
        count += pair in left
    return count
