"""The packed buffer of a step against the same arrays, built one token at a time."""

import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.batch import BatchBuilder, PackedLayout, StepInputs, unpack
from jaxpaged.buckets import bucket_for, rows_of, token_buckets
from jaxpaged.request import Request
from jaxpaged.sampling_params import SamplingParams
from jaxpaged.scheduler import ScheduledStep, Scheduler
from tests.core.pool_model import make_request, make_scheduler

BLOCK_SIZE, NUM_BLOCKS, MAX_SEQS, BUDGET, WIDTH = 4, 24, 5, 24, 12
PARAMS = (
    SamplingParams(temperature=0.0, max_tokens=8),
    SamplingParams(temperature=0.7, top_k=5, top_p=0.9, max_tokens=8),
    SamplingParams(temperature=1.0, repetition_penalty=1.3, presence_penalty=0.5, max_tokens=8),
    SamplingParams(temperature=0.0, max_tokens=8, prompt_logprobs=2),
    SamplingParams(temperature=1.0, n=3, min_p=0.1, max_tokens=8),
)


class Driver:
    """Schedules random requests and does for the builder what the engine does: binding rows."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.scheduler: Scheduler = make_scheduler(
            num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_num_seqs=MAX_SEQS, budget=BUDGET
        )
        self.builder = BatchBuilder(
            buckets=token_buckets(BUDGET, MAX_SEQS),
            max_num_seqs=MAX_SEQS,
            table_width=WIDTH,
            block_size=BLOCK_SIZE,
            num_blocks=NUM_BLOCKS,
        )
        self.owners: dict[int, tuple[Request, int]] = {}
        self.stem = [self.random.randrange(9) for _ in range(20)]

    def add(self, name: str) -> None:
        params = self.random.choice(PARAMS)
        own = [self.random.randrange(9) for _ in range(self.random.randint(1, 12))]
        prompt = self.stem[: self.random.randint(0, 20)] + own
        request, *_ = make_request(
            name, prompt, block_size=BLOCK_SIZE, max_tokens=8, n=params.n, params=params
        )
        self.scheduler.add(request)

    def next_step(self) -> ScheduledStep:
        step = self.scheduler.schedule()
        for request in step.rewritten:
            self.builder.rewrite_row(request.row)
        for request, _ in step.rows:
            owner = (request, request.num_preemptions)
            if self.owners.get(request.row) != owner:
                self.owners[request.row] = owner
                self.builder.clear_row(request.row)
                self.builder.sampling.set(request.row, request.params, seed=request.index + 2**40)
        return step


def naive(step: ScheduledStep, bucket: int) -> dict[str, np.ndarray]:
    """Everything but the sampling parameters, one token at a time."""
    rows = rows_of(bucket, MAX_SEQS)
    names = ("token_ids", "positions", "rows", "slots", "next_token_ids")
    out = {name: np.zeros(bucket, np.int32) for name in names}
    out |= {name: np.zeros(rows, np.int32) for name in ("seq_lens", "sample_at")}
    out["query_start_loc"] = np.full(rows + 1, step.num_tokens, np.int32)
    out["block_tables"] = np.zeros((rows, WIDTH), np.int32)
    all_logits = any(request.needs_all_logits for request, _ in step.rows)
    at = 0
    for row, (request, count) in enumerate(step.rows):
        out["query_start_loc"][row] = at
        for position in range(request.num_computed_tokens, request.num_computed_tokens + count):
            out["token_ids"][at] = request.token_ids[position]
            out["positions"][at], out["rows"][at] = position, row
            out["slots"][at] = request.table.slot(position)
            if all_logits and position + 1 < request.num_tokens:
                out["next_token_ids"][at] = request.token_ids[position + 1]
            at += 1
        out["seq_lens"][row] = request.num_computed_tokens + count
        out["sample_at"][row] = at - 1
        out["block_tables"][row, : len(request.table)] = request.table.ids
    return out


def check(step: ScheduledStep, bucket: int, inputs: StepInputs) -> None:
    expected, attention = naive(step, bucket), inputs.attention[0]
    found = {name: getattr(attention, name) for name in attention.__dataclass_fields__}
    found |= {name: getattr(inputs, name) for name in ("token_ids", "next_token_ids", "sample_at")}
    # Where a padding row samples is of no interest, as long as it is in bounds.
    sample_at = np.asarray(found["sample_at"])
    assert ((sample_at >= 0) & (sample_at < bucket)).all()
    found["sample_at"] = np.where(expected["seq_lens"] > 0, sample_at, 0)
    for name, value in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), value, err_msg=name)
    assert (np.asarray(attention.slots)[step.num_tokens :] < BLOCK_SIZE).all(), "padding writes a real block"
    wants = any(request.needs_all_logits for request, _ in step.rows)
    assert bool(inputs.wants_prompt_logprobs) == wants
    check_sampling(step, inputs)


def check_sampling(step: ScheduledStep, inputs: StepInputs) -> None:
    """Rows that catch up sample with their own parameters, all others are greedy and have no state."""
    sampling = inputs.sampling
    floats, ints = np.asarray(sampling.floats), np.asarray(sampling.ints)
    for i in range(len(ints)):
        request, count = step.rows[i] if i < len(step.rows) else (None, 0)
        if request is None or request.num_computed_tokens + count < request.num_tokens:
            assert floats[i, 0] == 0.0
            assert int(sampling.rows[i]) == 0
            continue
        params = request.params
        assert (
            floats[i].tolist()
            == np.float32(
                [
                    params.temperature,
                    params.top_p,
                    params.min_p,
                    params.repetition_penalty,
                    params.presence_penalty,
                    params.frequency_penalty,
                ]
            ).tolist()
        )
        position = request.num_tokens - request.num_prompt_tokens
        assert ints[i].tolist() == [params.top_k, request.index, 2**8, position]
        assert int(sampling.rows[i]) == (request.row if params.repetition_penalty != 1.0 else 0)


@pytest.mark.parametrize("seed", range(12))
def test_packed_equals_naive(seed: int) -> None:
    driver, steps = Driver(seed), 0
    for name in range(9):
        driver.add(str(name))
    while driver.scheduler.has_unfinished:
        step = driver.next_step()
        if not step.rows:
            continue
        bucket, buffer = driver.builder.build(step)
        assert bucket == bucket_for(step.num_tokens, driver.builder.buckets)
        layout = driver.builder.layout(bucket)
        assert buffer.dtype == np.int32
        assert buffer.shape == (layout.size,)
        check(step, bucket, unpack(buffer, layout))
        driver.scheduler.update(step, [driver.random.randrange(9) for _ in step.rows])
        steps += 1
    assert steps > 15


def test_unpacking_inside_a_program() -> None:
    driver = Driver(0)
    driver.add("a")
    step = driver.next_step()
    bucket, buffer = driver.builder.build(step)
    layout = driver.builder.layout(bucket)

    def leaves(packed: jax.Array) -> list[Any]:
        return jax.tree.leaves(vars(unpack(packed, layout)))

    inside, outside = jax.jit(leaves)(buffer), leaves(jnp.asarray(buffer))
    for one, other in zip(inside, outside, strict=True):
        np.testing.assert_array_equal(one, other)


def test_fields_cover_the_buffer_once() -> None:
    layout = PackedLayout(16, 5, 12)
    views = layout.views(np.arange(layout.size))
    assert np.concatenate([view.ravel() for view in views.values()]).tolist() == list(range(layout.size))
    assert {name: view.shape for name, view in views.items()} == dict(layout.fields())


@pytest.mark.parametrize("block", [-1, 0, NUM_BLOCKS, 2**31])
def test_a_block_out_of_range_is_refused(block: int) -> None:
    driver = Driver(0)
    driver.add("a")
    step = driver.next_step()
    step.rows[0][0].table.ids[-1] = block
    with pytest.raises(ValueError, match=f"{block}.*not all in"):
        driver.builder.build(step)
