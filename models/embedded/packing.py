"""Documents of token ids packed into training rows."""

from collections.abc import Iterator, Sequence

import numpy as np


def batches(
    documents: Sequence[np.ndarray], *, num_tokens: int, length: int, seed: int
) -> Iterator[np.ndarray]:
    """Endless batches int32 [num_tokens // length, length + 1]; the last column is only predicted.

    Every epoch shuffles the documents anew, joins them, cuts the stream into rows and shuffles the rows, so
    that a token meets another context each time. Depends on the seed alone.
    """
    rows_per_batch = num_tokens // length
    rng = np.random.default_rng(seed)
    while True:
        stream = np.concatenate([documents[i] for i in rng.permutation(len(documents))]).astype(np.int32)
        num_rows = (len(stream) - 1) // length
        starts = rng.permutation(num_rows) * length
        for first in range(0, num_rows - rows_per_batch + 1, rows_per_batch):
            chosen = starts[first : first + rows_per_batch]
            yield stream[chosen[:, None] + np.arange(length + 1)[None, :]]
