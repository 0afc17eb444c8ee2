"""A picture of a run: how latencies are distributed, and output tokens a second over time. Needs matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxpaged.serve.bench_serve.figures import Outcome
from jaxpaged.serve.bench_serve.report import LABELS
from jaxpaged.serve.terminal import seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (11.0, 7.0)  # inches
MAX_BINS = 60
MIN_BIN_SECONDS = 0.1  # of many steps, or their beat with the intervals is what one sees
COLOUR, MUTED = "#2563eb", "#6b7280"
MILLISECONDS_BELOW = 2.0


def save_plot(
    path: Path, outcomes: Sequence[Outcome], started: float, title: str, objectives: Mapping[str, float]
) -> None:
    """Writes the picture; the suffix of ``path`` says in which format. Failed requests are left out.

    Raises:
      ValueError: matplotlib knows no such format.
    """
    from matplotlib.figure import Figure

    good = [one for one in outcomes if one.failure is None]
    figure = Figure(figsize=SIZE, layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, 2).flat
    values = {
        "ttft": [one.ttft for one in good],
        "itl": [gap for one in good for gap in one.itl],
        "e2el": [one.e2el for one in good],
    }
    for ax, (metric, times) in zip(axes, values.items(), strict=False):
        _draw_cdf(ax, times, LABELS[metric], objectives.get(metric))
    _draw_rate(axes[3], good, started)
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:
        raise ValueError(f"--plot={path}: {error}") from None


def _draw_cdf(ax: "Axes", times: Sequence[float], label: str, objective: float | None) -> None:
    """The share of values at or below each value."""
    scale, unit = (1e3, "ms") if not times or max(times) < MILLISECONDS_BELOW else (1.0, "s")
    ax.set(title=label, xlabel=unit, ylabel="share", ylim=(0, 1.02))
    ax.grid(alpha=0.25)
    if times:
        ordered = np.sort(np.asarray(times)) * scale
        ax.ecdf(ordered, color=COLOUR)
        for share in (0.5, 0.99):
            mark = float(np.percentile(ordered, 100 * share))
            ax.plot(mark, share, "o", color=COLOUR, markersize=4)
            # A distribution leaves room above and left of its curve, and below and right of it.
            goes_left = mark > ordered[-1] / 2
            ax.annotate(
                f"p{100 * share:g} {seconds(mark / scale)}",
                (mark, share),
                xytext=(-7, 0) if goes_left else (7, -2),
                textcoords="offset points",
                ha="right" if goes_left else "left",
                va="center" if goes_left else "top",
                color=MUTED,
            )
        ax.set_xlim(0, 1.06 * max(ordered[-1], (objective or 0.0) * scale) or 1.0)  # gaps may all be 0
    if objective is not None:
        ax.axvline(objective * scale, color="#dc2626", linewidth=1, label=f"objective {seconds(objective)}")
        ax.legend(loc="lower right", fontsize=8)


def _draw_rate(ax: "Axes", good: Sequence[Outcome], started: float) -> None:
    """Output tokens a second over time."""
    edges, rates = token_rate(good, started)
    ax.set(title="output tokens per second", xlabel="s", ylabel="tokens/s")
    ax.grid(alpha=0.25)
    ax.stairs(rates, edges, color=COLOUR, fill=True, alpha=0.35)
    ax.set_ylim(bottom=0)


def token_rate(good: Sequence[Outcome], started: float) -> tuple[np.ndarray, np.ndarray]:
    """Edges of equal intervals in seconds after ``started``, [n + 1], and output tokens a second in each, [n].

    The tokens of an answer are spread evenly over the chunks that brought them.
    """
    pairs = [(one.token_times, one.output_len / len(one.token_times)) for one in good]
    times = np.concatenate([np.asarray(times) - started for times, _ in pairs] or [np.zeros(0)])
    weights = np.concatenate([np.full(len(times), weight) for times, weight in pairs] or [np.zeros(0)])
    end = max(float(times.max(initial=0.0)), 1e-3)
    num_bins = max(1, min(MAX_BINS, int(end / MIN_BIN_SECONDS)))
    counts, edges = np.histogram(times, bins=num_bins, range=(0.0, end), weights=weights)
    return edges, counts / np.diff(edges)
