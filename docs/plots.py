"""Draws ``block_map.png`` beside this file: the embedded model in a pool that is too small for its requests.

    python docs/plots.py

Takes a minute on a CPU, most of it compiling. Greedy decoding: the picture comes out the same every time.
"""

from pathlib import Path

from jaxpaged import Engine, SamplingParams
from jaxpaged.block_trace import BlockTrace
from jaxpaged.models import embedded_model_path
from jaxpaged.plot import block_map
from jaxpaged.serve.demo import SHARED

ENDINGS = ("push(self, ", "pop(self", "__len__(self", "__repr__(self", "clear(self", "peek(self")
OTHERS = (
    "import os\nimport sys\n\ndef main(",
    "def read_lines(path):\n    ",
    "class Point:\n    def __eq__(self, other):\n        if ",
)
NUM_BLOCKS = 64


def arrivals() -> list[tuple[int, str, SamplingParams]]:
    """Step, prompt and parameters of each request: one alone, its prefix by others, then more than fits."""

    def greedy(max_tokens: int) -> SamplingParams:
        return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)

    alone = [(0, SHARED + ENDINGS[0], greedy(40))]
    together = [(60, SHARED + ending, greedy(40 + 16 * i)) for i, ending in enumerate(ENDINGS[1:5])]
    revived = [(180, SHARED + ending, greedy(70)) for ending in ENDINGS[4:]]
    crowd = [(240 + 12 * i, OTHERS[i % 3], greedy(150 + 20 * i)) for i in range(9)]
    return alone + together + revived + crowd


def run(engine: Engine) -> BlockTrace:
    """Sends the requests when their steps have come; the states of all blocks at every step."""
    trace = engine.trace_blocks()
    pending = list(enumerate(arrivals()))
    while pending or engine.has_unfinished_requests:
        now = engine.stats().num_steps
        while pending and (pending[0][1][0] <= now or not engine.has_unfinished_requests):
            number, (_, prompt, params) = pending.pop(0)
            engine.add_request(f"request-{number}", prompt, params)
        engine.step()
    return trace


def main() -> None:
    """Writes the picture."""
    with Engine(
        embedded_model_path(),
        num_blocks=NUM_BLOCKS,
        block_size=16,
        max_model_len=512,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        num_scheduler_steps=1,
    ) as engine:
        trace = run(engine)
    ax = block_map(trace, title="A prefix shared, found again in the cache, and pushed out by a crowd")
    path = Path(__file__).with_name("block_map.png")
    ax.figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
