"""The time of paged attention, which cannot be seen inside of a compiled step: one layer of it, run by itself."""

import logging
import statistics
import time
from collections.abc import Sequence

import jax
import numpy as np

from jaxpaged.models import Parameters
from jaxpaged.pallas_kernels import AttentionBatch, AttentionVariant
from jaxpaged.program import Pool, Programs
from jaxpaged.request import Request

logger = logging.getLogger(__name__)

LAYER = 0


class AttentionProbe:
    """Times the paged attention of the first layer over requests, on a pool that it only reads.

    It has one program, for as many rows as the engine has at most: every implementation goes by the rows that are
    real, so padding costs little. A kernel that chooses its tiles by the bucket may choose others in a smaller one.
    Queries are zeros, which take as long as any. Of a pool of several formats it reads the one of the first layer.

    Args:
      functions, weights, operands: as the ``Runner`` has them.
      pool: one of the shape that will be read.
      num_rows: B, requests at most.
      table_width: M of the block tables.
    """

    def __init__(
        self,
        functions: Programs,
        weights: Parameters,
        operands: tuple[jax.Array, ...],
        pool: Pool,
        *,
        num_rows: int,
        table_width: int,
    ) -> None:
        model = functions.merge(weights)
        own = AttentionVariant(sliding_window=model.layers[LAYER].sliding_window)
        self._group, _ = functions.layout.places[LAYER]
        self._num_rows, self._table_width = num_rows, table_width
        self._operands = operands
        shape = (num_rows, model.config.num_heads, model.config.head_dim)
        self._queries = jax.device_put(np.zeros(shape, model.dtype))

        def attend(
            q: jax.Array, pool: Pool, batch: AttentionBatch, operands: tuple[jax.Array, ...]
        ) -> jax.Array:
            return functions.attend(q, pool, LAYER, batch, own, functions.user_variant(operands))

        started = time.perf_counter()
        lowered = jax.jit(attend).lower(self._queries, pool, self._batch([]), operands)
        self._program = lowered.compile(functions.compiler_options)
        logger.info("compiled the attention probe in %.2f s", time.perf_counter() - started)
        self.measure(pool, [], 1)  # the first run loads it

    def measure(self, pool: Pool, requests: Sequence[Request], repeats: int) -> float:
        """Median of the seconds for one decode token of each request, from the launch until the result is there."""
        batch = self._batch(requests)
        jax.block_until_ready((pool, batch))
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            jax.block_until_ready(self._program(self._queries, pool, batch, self._operands))
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)

    def _batch(self, requests: Sequence[Request]) -> AttentionBatch:
        """The last computed token of each request attends to all before it."""
        num_rows, count = self._num_rows, len(requests)
        tables = np.zeros((num_rows, self._table_width), np.int32)
        seq_lens, rows, positions = np.zeros((3, num_rows), np.int32)
        for row, request in enumerate(requests):
            ids = request.tables[self._group].ids
            tables[row, : len(ids)] = ids
            seq_lens[row] = request.num_computed_tokens
        rows[:count] = np.arange(count)
        positions[:count] = seq_lens[:count] - 1
        starts = np.minimum(np.arange(num_rows + 1, dtype=np.int32), count)
        slots = np.zeros(num_rows, np.int32)  # nothing is written
        return AttentionBatch(*jax.device_put((tables, seq_lens, starts, rows, positions, slots)))
