"""The pool is updated in place, memory stays flat, and close() gives it back."""

import gc
import os
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxpaged import Engine
from tests.engine.tiny import GREEDY, dense_greedy, idle, new_engine, prompt_of, tokens_of

MIB = 2**20


def resident_bytes() -> int:
    """Physical memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")


def state_of(engine: Engine) -> Any:
    return engine._core.runner.state  # type: ignore[union-attr]


def test_steps_write_where_the_pool_is(engine: Engine) -> None:
    def places() -> list[int]:
        return [array.unsafe_buffer_pointer() for array in jax.tree.leaves(state_of(engine))]

    before = places()
    params = GREEDY.clone(
        n=3, repetition_penalty=1.1, min_tokens=4
    )  # also copies blocks and sets sampler rows
    copied = engine.stats().blocks_copied
    engine.generate([prompt_of(21), prompt_of(30)], params)
    assert engine.stats().blocks_copied > copied
    assert places() == before


@pytest.mark.parametrize("attention", [None, "xla"])
def test_no_program_copies_the_pool(attention: str | None) -> None:
    """By XLA's own account: the state is aliased, and no temporary is as large as half a side of the pool."""
    with new_engine(num_blocks=4096, max_num_seqs=2, max_num_batched_tokens=2, attention=attention) as engine:
        runner = engine._core.runner  # type: ignore[union-attr]
        side = state_of(engine).pool.k.nbytes
        assert side == 2 * 4096 * 2 * 4 * 16 * 4
        analysis = runner.memory_analysis(2)
        assert analysis.alias_size_in_bytes >= sum(a.nbytes for a in jax.tree.leaves(state_of(engine)))
        assert analysis.temp_size_in_bytes < side / 2


@needs_proc
@pytest.mark.slow
def test_memory_is_flat_over_ten_thousand_steps() -> None:
    """Requests of all kinds come and go.

    From step 2,000 to step 10,000 the process may grow by 4 MiB: about 500 bytes a step, which is less than
    what one request keeps on the host, and far less than any array of the device.
    """
    sizes: dict[int, tuple[int, int]] = {}
    with new_engine(num_scheduler_steps=1) as engine, idle(engine):
        start, i = engine.stats().num_steps, 0
        for target in (2_000, 10_000):
            while engine.stats().num_steps - start < target:
                i += 1
                params = GREEDY.clone(max_tokens=60, n=1 + i % 2, logprobs=[None, 2][i // 2 % 2])
                prompts = [prompt_of(3 + (i + k) % 30, seed=i + k) for k in range(1 + i % 4)]
                engine.generate(prompts, params.clone(temperature=float(i % 3)))
            gc.collect()
            sizes[target] = (resident_bytes(), len(jax.live_arrays()))
    assert sizes[10_000][1] == sizes[2_000][1]
    assert sizes[10_000][0] - sizes[2_000][0] < 4 * MIB


@needs_proc
def test_close_gives_the_memory_back() -> None:
    one_program = {"max_num_seqs": 2, "max_num_batched_tokens": 2, "num_scheduler_steps": 1}
    params = GREEDY.clone(max_tokens=1)
    with new_engine(
        num_blocks=60_000, **one_program
    ) as warm:  # what compiling leaves behind is not the engine's
        warm.generate(prompt_of(4), params)
    gc.collect()
    before = resident_bytes()
    engine = new_engine(num_blocks=60_000, **one_program)
    pool = state_of(engine).pool
    size = pool.k.nbytes + pool.v.nbytes
    assert size > 100 * MIB
    assert tokens_of(engine.generate(prompt_of(4), params)) == [dense_greedy(prompt_of(4), 1)]
    assert resident_bytes() - before > 0.9 * size
    engine.close()
    assert pool.k.is_deleted()
    assert pool.v.is_deleted()
    assert resident_bytes() - before < 0.3 * size
