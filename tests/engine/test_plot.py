"""Plots: the data in them are the data that went in, and they draw without a display."""

import io
import sys

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from jaxpaged.block_trace import CACHED, DUMMY, FREE, LIVE, PINNED, SHARED, STATE_NAMES, SWAPPING, BlockTrace
from jaxpaged.errors import InvalidRequestError
from jaxpaged.plot import COLOURS, block_map, usage
from jaxpaged.records import IterationRecord

STATES = [FREE, CACHED, LIVE, SHARED, PINNED, SWAPPING]


def trace_of(steps: list[int], num_blocks: int = 8) -> BlockTrace:
    """Block b after the first is in state ``(b + i) % 6`` in sample ``i``."""
    trace = BlockTrace(num_blocks)
    for i, step in enumerate(steps):
        trace.record(step, bytes([DUMMY, *[STATES[(b + i) % len(STATES)] for b in range(1, num_blocks)]]))
    return trace


def drawn(figure: Figure) -> np.ndarray:
    """The picture as ``[height, width, 3]`` bytes, by way of a PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80)
    file.seek(0)
    return np.round(matplotlib.image.imread(file)[:, :, :3] * 255).astype(np.uint8)


def colours_in(picture: np.ndarray) -> set[tuple[int, ...]]:
    return set(map(tuple, np.unique(picture.reshape(-1, 3), axis=0).tolist()))


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(round(255 * part) for part in to_rgb(colour))


@pytest.mark.parametrize("steps", [[1, 2, 3, 4], [1, 9, 10, 30]], ids=["even", "uneven"])
def test_block_map_shows_every_state_where_it_was(steps: list[int]) -> None:
    trace = trace_of(steps)
    ax = block_map(trace, title="a title")
    [image] = ax.images
    assert np.asarray(image.get_array()).T.tolist() == [list(sample) for sample in trace.samples]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("step", "block", "a title")
    assert ax.get_ylim() == (-0.5, 7.5)
    assert ax.get_xlim() == (steps[0], 2 * steps[-1] - steps[-2])

    ax.set_axis_off()
    ax.get_legend().remove()
    ax.set_title("")
    ax.set_position((0, 0, 1, 1))
    ax.figure.set_layout_engine("none")
    picture = drawn(ax.figure)
    assert colours_in(picture) == {rgb(colour) for colour in COLOURS.values()}
    height, width, _ = picture.shape
    start, end = ax.get_xlim()
    for i, sample in enumerate(trace.samples):
        right = steps[i + 1] if i + 1 < len(steps) else end
        column = int(width * ((steps[i] + right) / 2 - start) / (end - start))
        for block, state in enumerate(sample):
            row = int(height * (1 - (block + 0.5) / trace.num_blocks))
            assert tuple(picture[row, column]) == rgb(COLOURS[state]), (i, block)


def test_legend_names_the_states_that_occur() -> None:
    trace = BlockTrace(3)
    trace.record(1, bytes([DUMMY, FREE, LIVE]))
    ax = block_map(trace)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["dummy", "live", "free"]
    assert rgb(COLOURS[LIVE]) in colours_in(drawn(ax.figure))


def test_states_have_distinct_colours() -> None:
    assert len(set(COLOURS.values())) == len(COLOURS) == len(STATE_NAMES)


def records() -> list[IterationRecord]:
    """Ten blocks; requests that run, wait and are swapped out."""
    return [
        IterationRecord(
            2 * i,
            0.0,
            num_running=i,
            num_waiting=3 - i,
            num_swapped=i % 2,
            num_live_blocks=2 * i,
            num_cached_blocks=1,
            num_free_blocks=10 - 2 * i,
        )
        for i in range(4)
    ]


def test_usage_stacks_to_the_whole_pool() -> None:
    ax = usage(records())
    live, cached, free = ax.collections
    at_the_end = [path.get_paths()[0].get_extents().y1 for path in (live, cached, free)]
    assert at_the_end == [6.0, 7.0, 10.0]
    assert ax.get_xlim() == (0, 7)  # the last record is as wide as its one step
    assert ax.get_ylim() == (0, 10)
    [requests] = [other for other in ax.figure.axes if other is not ax]
    lines = {line.get_label(): list(line.get_ydata()) for line in requests.lines}
    assert lines == {"running": [0, 1, 2, 3, 3], "waiting": [3, 2, 1, 0, 0], "swapped out": [0, 1, 0, 1, 1]}
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["free", "cached", "live blocks", "running", "waiting", "swapped out"]


def test_usage_draws_each_record_from_its_step_on() -> None:
    ax = usage(records())
    [requests] = [other for other in ax.figure.axes if other is not ax]
    requests.remove()
    ax.set_axis_off()
    ax.get_legend().remove()
    ax.set_position((0, 0, 1, 1))
    ax.figure.set_layout_engine("none")
    picture = drawn(ax.figure)
    height, width, _ = picture.shape
    names = {rgb(COLOURS[state]): state for state in COLOURS}

    def column(step: float) -> list[int]:
        """The states at the middle of each of the ten blocks, from the bottom."""
        rows = [int(height * (1 - (block + 0.5) / 10)) for block in range(10)]
        return [names[tuple(picture[row, int(width * step / 7)].tolist())] for row in rows]

    for i in range(4):
        assert column(2 * i + 0.5) == [LIVE] * (2 * i) + [CACHED] + [FREE] * (9 - 2 * i)


def test_nobody_swapped_has_no_line() -> None:
    ax = usage([IterationRecord(1, 0.0, num_running=1, num_live_blocks=1, num_free_blocks=2)])
    assert "swapped out" not in [text.get_text() for text in ax.get_legend().get_texts()]
    assert drawn(ax.figure).std() > 0


def test_they_draw_into_given_axes() -> None:
    above, below = Figure(layout="constrained").subplots(2)
    assert block_map(trace_of([1]), ax=above) is above
    assert usage(records(), ax=below) is below


def test_nothing_goes_through_pyplot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it raises
    for ax in (block_map(trace_of([1, 2])), usage(records())):
        assert drawn(ax.figure).std() > 0


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"^trace=BlockTrace\(0 samples of 4 blocks"):
        block_map(BlockTrace(4))
    with pytest.raises(InvalidRequestError, match="records="):
        usage([])


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        block_map(trace_of([1]))
    with pytest.raises(ImportError, match="pip install matplotlib"):
        usage(records())
