"""From a scheduled step to the arrays of its bucket: the only place that pads.

All integers of a step travel in one int32 buffer (the floats of sampling by their bits), because on every
backend a transfer costs more than its bytes. ``PackedLayout`` says where what lies; the host writes through it
and the compiled program reads through it.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax import lax

from jaxpaged.buckets import bucket_for, programs_of, rows_of
from jaxpaged.pallas_kernels import AttentionBatch
from jaxpaged.request import Request
from jaxpaged.sampler import SamplingBatch
from jaxpaged.sampling_rows import SamplingTable
from jaxpaged.step_plan import ScheduledStep

NUM_FLOATS, NUM_INTS = 6, 4  # columns of SamplingBatch
PROMPT_LOGPROBS = 1  # bit of the step's own flag word


@dataclass(frozen=True)
class PackedLayout:
    """Places of the fields of one bucket in the buffer: T tokens, B rows, G groups of block tables M wide."""

    num_tokens: int
    num_rows: int
    table_width: int
    num_groups: int = 1

    def fields(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in order."""
        t, b, m, g = self.num_tokens, self.num_rows, self.table_width, self.num_groups
        return [
            ("token_ids", (t,)),
            ("positions", (t,)),
            ("rows", (t,)),
            ("slots", (g, t)),
            ("next_token_ids", (t,)),
            ("query_start_loc", (b + 1,)),
            ("seq_lens", (b,)),
            ("sample_at", (b,)),
            ("state_rows", (b,)),
            ("token_rows", (b,)),
            ("ints", (b, NUM_INTS)),
            ("floats", (b, NUM_FLOATS)),
            ("flags", (2,)),
            ("block_tables", (g, b, m)),
        ]

    @cached_property
    def spans(self) -> list[tuple[str, int, int, tuple[int, ...]]]:
        """Name, begin, end and shape of each field."""
        spans, at = [], 0
        for name, shape in self.fields():
            spans.append((name, at, at + math.prod(shape), shape))
            at += math.prod(shape)
        return spans

    @property
    def size(self) -> int:
        """Length of the buffer."""
        return self.spans[-1][2]

    def views(self, buffer: Any) -> dict[str, Any]:
        """Each field as a reshaped slice of a numpy buffer (a view) or of a traced array."""
        return {name: buffer[begin:end].reshape(shape) for name, begin, end, shape in self.spans}


@dataclass(frozen=True)
class StepInputs:
    """What the program of a bucket works on, unpacked on the device."""

    token_ids: (
        jax.Array
    )  # int32 [T]; -r for the token that engine row r sampled last, which only the device knows
    next_token_ids: jax.Array  # int32 [T], the token that follows in the prompt, for prompt log-probabilities
    sample_at: jax.Array  # int32 [B], index of the token whose logits each row samples from
    token_rows: jax.Array  # int32 [B], engine row of each row that samples, else 0
    attention: tuple[AttentionBatch, ...]  # one for each group of layers
    sampling: SamplingBatch
    wants_prompt_logprobs: jax.Array  # bool []


def unpack(buffer: jax.Array, layout: PackedLayout) -> StepInputs:
    """The fields of a packed buffer; runs inside the compiled program."""
    f = layout.views(buffer)
    attention = tuple(
        AttentionBatch(
            f["block_tables"][group],
            f["seq_lens"],
            f["query_start_loc"],
            f["rows"],
            f["positions"],
            f["slots"][group],
        )
        for group in range(layout.num_groups)
    )
    floats = lax.bitcast_convert_type(f["floats"], np.float32)
    sampling = SamplingBatch(f["state_rows"], floats, f["ints"], f["flags"][0])
    return StepInputs(
        f["token_ids"],
        f["next_token_ids"],
        f["sample_at"],
        f["token_rows"],
        attention,
        sampling,
        f["flags"][1] & PROMPT_LOGPROBS != 0,
    )


class _Decoding:
    """The buffers of nothing but decode rows, kept because the next step often has the same rows, one token later.

    There are two, taken in turn: XLA may read a buffer where it lies, until its step has finished, and the next step
    is built before that.
    """

    def __init__(
        self, requests: list[Request], engine_rows: np.ndarray, bucket: int, buffer: np.ndarray, version: int,
        layout: PackedLayout,
    ) -> None:  # fmt: skip
        self.requests, self.engine_rows, self.bucket, self.version = requests, engine_rows, bucket, version
        self.num_steps = 1
        self.index = np.arange(len(requests))
        self.num_prompt_tokens = np.array([request.num_prompt_tokens for request in requests], np.int32)
        self._buffers = [buffer, buffer.copy()]
        self._views = [layout.views(each) for each in self._buffers]
        self.positions = self._views[0]["positions"][: len(requests)].copy()
        self.tables_changed = [False, False]  # whether a buffer's block tables are out of date
        self._turn = 0

    def next(self) -> tuple[np.ndarray, dict[str, np.ndarray], int]:
        """The buffer to write, its fields, and which of the two it is."""
        self._turn = 1 - self._turn
        return self._buffers[self._turn], self._views[self._turn], self._turn


class BatchBuilder:
    """Builds the packed buffer of a step.

    It keeps the block tables of running requests as lines of one array, by group and engine row, and copies only the
    block ids that are new since the last step. A buffer is good until the ``build`` after the next: a step of the
    same decode rows as the one before is written over the buffer of two steps ago, which must have finished.
    """

    def __init__(
        self,
        *,
        buckets: tuple[int, ...],
        max_num_seqs: int,
        table_width: int,
        block_size: int,
        num_blocks: int,
        num_scheduler_steps: int = 1,
        num_groups: int = 1,
    ) -> None:
        self.buckets = buckets
        self.programs = programs_of(buckets, max_num_seqs, num_scheduler_steps)
        self.max_num_seqs = max_num_seqs
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.num_groups = num_groups
        self.sampling = SamplingTable(max_num_seqs + 1)
        self._tables = np.zeros((num_groups, max_num_seqs + 1, table_width), np.int32)
        self._written = [0] * (max_num_seqs + 1)  # ids of a row's lines that are up to date
        self._last: _Decoding | None = None
        self._layouts = {
            b: PackedLayout(b, rows_of(b, max_num_seqs), table_width, num_groups) for b in buckets
        }

    def layout(self, bucket: int) -> PackedLayout:
        """The layout of a bucket."""
        return self._layouts[bucket]

    def clear_row(self, row: int) -> None:
        """A row changes hands: its lines are written anew, and zero beyond the new owner's blocks."""
        self._tables[:, row] = 0
        self._written[row] = 0
        self.sampling.clear(row)

    def rewrite_row(self, row: int) -> None:
        """Blocks in the middle of a row's tables changed (copy on write)."""
        self._written[row] = 0

    def _sync_tables(self, request: Request) -> None:
        """Adds the ids that are new. What a window has left behind may stay: nobody looks at it."""
        row, first = request.row, self._written[request.row]
        for group, table in enumerate(request.tables):
            new = table.ids[first:]
            # JAX clamps or drops an index that is out of range without a word; here it still can be seen.
            if not all(0 <= block < self.num_blocks for block in new) or 0 in table.ids[-1:]:
                raise ValueError(f"block ids {new} of row {row} are not all in [1, {self.num_blocks - 1}]")
            self._tables[group, row, first : len(table.ids)] = new
        self._written[row] = len(request.table.ids)

    def build(self, step: ScheduledStep) -> tuple[int, np.ndarray]:
        """The bucket of a step and its packed buffer."""
        last = self._last
        if last is not None and self._is_next(step, last):
            return self._build_next(step, last)
        bucket = bucket_for(step.num_tokens, self.buckets)
        layout = self._layouts[bucket]
        buffer = np.zeros(layout.size, np.int32)
        f = layout.views(buffer)
        requests = [request for request, _ in step.rows]
        num_rows = len(requests)
        for request in requests:
            if len(request.table.ids) != self._written[request.row]:
                self._sync_tables(request)
        engine_rows = np.array([request.row for request in requests], np.int32)
        computed = np.array([request.num_computed_tokens for request in requests], np.int32)
        known = np.array([len(r.token_ids) + r.num_pending for r in requests], np.int32)
        counts = np.array([count for _, count in step.rows], np.int32)
        self._fill_tokens(step, f, computed, counts)
        f["seq_lens"][:num_rows] = computed + counts
        f["block_tables"][:, :num_rows] = self._tables[:, engine_rows]
        rows, positions = f["rows"][: step.num_tokens], f["positions"][: step.num_tokens]
        blocks = f["block_tables"][:, rows, positions // self.block_size]
        f["slots"][:, : step.num_tokens] = blocks * self.block_size + positions % self.block_size
        # Rows that do not sample in this step, and padding, are those of the dummy row.
        sampled_rows, outputs = np.zeros((2, layout.num_rows), np.int32)
        sampled_rows[:num_rows] = np.where(computed + counts == known, engine_rows, 0)
        outputs[:num_rows] = known - [request.num_prompt_tokens for request in requests]
        f["token_rows"][:] = sampled_rows
        sampling = self.sampling.batch(sampled_rows, outputs)
        f["state_rows"][:] = sampling.rows
        f["ints"][:] = sampling.ints
        f["floats"][:] = sampling.floats.view(np.int32)
        f["flags"][0] = sampling.flags
        if any(request.needs_all_logits for request in requests):
            f["flags"][1] = PROMPT_LOGPROBS
            self._fill_next_tokens(step, f["next_token_ids"])
        self._last = None
        if (counts == 1).all() and sampled_rows[:num_rows].all() and not f["flags"][1]:
            self._last = _Decoding(requests, engine_rows, bucket, buffer, self.sampling.version, layout)
            self._last.num_steps = step.num_steps
        return bucket, buffer

    def _is_next(self, step: ScheduledStep, last: _Decoding) -> bool:
        """Whether a step has the decode rows of the last one, with the same sampling parameters.

        They all sampled then, so each has one token to compute now; who lost its row meanwhile, or its blocks, was
        bound to a row again, which changed the version.
        """
        if step.num_tokens != len(last.requests) or last.version != self.sampling.version:
            return False
        return [request for request, _ in step.rows] == last.requests

    def _build_next(self, step: ScheduledStep, last: _Decoding) -> tuple[int, np.ndarray]:
        """What differs between two steps of the same decode rows, written over the buffer of two steps ago."""
        requests, count = last.requests, len(last.requests)
        buffer, f, turn = last.next()
        for request in step.grown:
            if len(request.table.ids) != self._written[request.row]:
                self._sync_tables(request)
                last.tables_changed = [True, True]
        tables = f["block_tables"][:, :count]
        if last.tables_changed[turn]:
            tables[:] = self._tables[:, last.engine_rows]
            last.tables_changed[turn] = False
        positions = last.positions
        positions += last.num_steps
        last.num_steps = step.num_steps
        assert positions[0] == requests[0].num_computed_tokens, "not the step after the last"
        f["positions"][:count] = positions
        # Nobody's last token is known yet, or everybody's.
        if requests[0].num_pending:
            f["token_ids"][:count] = -last.engine_rows
        else:
            f["token_ids"][:count] = [request.token_ids[-1] for request in requests]
        blocks = tables[:, last.index, positions // self.block_size]
        f["slots"][:, :count] = blocks * self.block_size + positions % self.block_size
        f["seq_lens"][:count] = positions + 1
        f["ints"][:count, 3] = positions + 1 - last.num_prompt_tokens
        return last.bucket, buffer

    @staticmethod
    def _fill_tokens(
        step: ScheduledStep, f: dict[str, np.ndarray], computed: np.ndarray, counts: np.ndarray
    ) -> None:
        """Token ids, positions, rows and where each row begins and samples."""
        num_rows, num_tokens = len(counts), step.num_tokens
        ends = np.cumsum(counts, dtype=np.int32)
        tokens: list[int] = []
        for request, count in step.rows:
            done = request.num_computed_tokens
            if done < len(request.token_ids):
                tokens += request.token_ids[done : done + count]
            if done + count > len(request.token_ids):
                tokens.append(-request.row)  # the device knows it
        if num_rows == num_tokens:
            f["rows"][:num_tokens] = np.arange(num_rows)
            f["positions"][:num_tokens] = computed
        else:
            rows = np.repeat(np.arange(num_rows, dtype=np.int32), counts)
            f["rows"][:num_tokens] = rows
            f["positions"][:num_tokens] = (
                np.arange(num_tokens, dtype=np.int32) + (computed + counts - ends)[rows]
            )
        f["token_ids"][:num_tokens] = tokens
        f["query_start_loc"][1 : num_rows + 1] = ends
        f["query_start_loc"][num_rows + 1 :] = num_tokens
        f["sample_at"][:num_rows] = ends - 1

    @staticmethod
    def _fill_next_tokens(step: ScheduledStep, out: np.ndarray) -> None:
        at = 0
        for request, count in step.rows:
            first = request.num_computed_tokens + 1
            following = request.token_ids[first : first + count]
            out[at : at + len(following)] = following
            at += count
