"""Pictures of the KV memory: every block at every step, and how many were in use. Needs matplotlib.

Colours are those of Okabe and Ito (Color Universal Design, 2008), which colour-blind people can tell apart.
Nothing here touches pyplot: without an ``ax`` a figure of its own is made, ``ax.figure``, which a notebook shows when
it is named last in a cell and ``ax.figure.savefig(path)`` writes, with or without a display.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxpaged.block_trace import CACHED, DUMMY, FREE, LIVE, PINNED, SHARED, STATE_NAMES, SWAPPING, BlockTrace
from jaxpaged.errors import InvalidRequestError
from jaxpaged.records import IterationRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    FREE: "#eeeeee",
    CACHED: "#56b4e9",
    LIVE: "#0072b2",
    SHARED: "#e69f00",
    PINNED: "#cc79a7",
    SWAPPING: "#009e73",
    DUMMY: "#555555",
}
_RUNNING, _WAITING, _SWAPPED = "#000000", "#d55e00", COLOURS[SWAPPING]


def block_map(trace: BlockTrace, *, ax: "Axes | None" = None, title: str | None = None) -> "Axes":
    """Block ids upwards, steps to the right, one colour for each state.

    A sample is drawn from its step on to the next sample. Lines along one id tell who keeps a block, edges at one
    step what changes together. The legend names the states that occur.

    Args:
      trace: what ``Engine.trace_blocks`` returned, after some steps.
      ax: axes to draw into; None makes a figure.
      title: above the map.

    Raises:
      InvalidRequestError: the trace holds nothing yet.
      ImportError: matplotlib is missing.
    """
    if not len(trace):
        raise InvalidRequestError("trace", trace, "holds no step yet")
    ax = _axes(ax, (9.0, 4.5))
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    states = np.frombuffer(b"".join(trace.samples), np.uint8).reshape(len(trace), trace.num_blocks).T
    steps = trace.steps
    last_width = steps[-1] - steps[-2] if len(steps) > 1 else 1
    edges = np.array([*steps, steps[-1] + last_width], np.float64)
    colours = ListedColormap([COLOURS[state] for state in range(len(STATE_NAMES))])
    norm = Normalize(-0.5, len(STATE_NAMES) - 0.5)  # the middle of a state's colour
    ax.pcolorfast(edges, np.arange(trace.num_blocks + 1) - 0.5, states, cmap=colours, norm=norm)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="step", ylabel="block")
    if title is not None:
        ax.set_title(title)
    present = np.unique(states)
    ax.legend(
        handles=[
            Patch(facecolor=COLOURS[state], edgecolor="#999999", linewidth=0.5, label=STATE_NAMES[state])
            for state in sorted(COLOURS, reverse=True)
            if state in present
        ],
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        frameon=False,
    )
    return ax


def usage(records: Sequence[IterationRecord], *, ax: "Axes | None" = None) -> "Axes":
    """Live, cached and free blocks over the steps, stacked; on a second axis the requests that run and wait.

    Args:
      records: iterations in ascending order, as ``Records.iterations`` returns them.
      ax: axes for the blocks; None makes a figure. The second axis is made beside it.

    Returns:
      The axes of the blocks.

    Raises:
      InvalidRequestError: there are no records.
      ImportError: matplotlib is missing.
    """
    if not records:
        raise InvalidRequestError("records", records, "holds no iteration yet")
    ax = _axes(ax, (9.0, 3.6))
    from matplotlib.ticker import MaxNLocator

    # Each record is drawn from its step on to the next one; the last as far as its program was long.
    steps = [*(r.step for r in records), records[-1].step + max(1, records[-1].num_steps)]
    records = [*records, records[-1]]
    ax.stackplot(
        steps,
        [r.num_live_blocks for r in records],
        [r.num_cached_blocks for r in records],
        [r.num_free_blocks - r.num_cached_blocks for r in records],
        labels=["live blocks", "cached", "free"],
        colors=[COLOURS[LIVE], COLOURS[CACHED], COLOURS[FREE]],
        step="post",
    )
    requests = ax.twinx()
    _request_lines(requests, steps, records)
    num_blocks = max(r.num_live_blocks + r.num_free_blocks for r in records)
    ax.set(xlabel="step", ylabel="blocks", xlim=(steps[0], steps[-1]), ylim=(0, max(1, num_blocks)))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    for axis in (ax.yaxis, requests.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    handles = [*ax.get_legend_handles_labels()[0][::-1], *requests.get_legend_handles_labels()[0]]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.07, 1.0), frameon=False)
    return ax


def _request_lines(ax: "Axes", steps: Sequence[int], records: Sequence[IterationRecord]) -> None:
    """How many requests run, wait and are swapped out, this last only if any ever was."""
    from matplotlib.patheffects import withStroke

    lines = [
        ("running", [r.num_running for r in records], _RUNNING, "-"),
        ("waiting", [r.num_waiting for r in records], _WAITING, "-"),
        ("swapped out", [r.num_swapped for r in records], _SWAPPED, "--"),
    ]
    for label, counts, colour, style in lines:
        if label == "swapped out" and not any(counts):
            continue
        ax.plot(
            steps,
            counts,
            style,
            color=colour,
            linewidth=1.6,
            drawstyle="steps-post",
            label=label,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
    ax.set(ylabel="requests", ylim=(0, 1.05 * max(1, ax.dataLim.y1)))


def _axes(ax: "Axes | None", size: tuple[float, float]) -> "Axes":
    """``ax``, or the axes of a new figure of ``size`` inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("jaxpaged.plot needs matplotlib: pip install matplotlib") from error
    if ax is not None:
        return ax
    return Figure(figsize=size, layout="constrained").subplots()
