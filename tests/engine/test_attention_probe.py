"""Measuring attention between steps: a time, and nothing else is different for it."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jaxpaged import AttentionVariant, Engine, attention_probe
from jaxpaged.attention_probe import AttentionProbe
from jaxpaged.errors import EngineClosedError, InvalidRequestError
from jaxpaged.pallas_kernels import AttentionBatch, KVPool
from jaxpaged.pallas_kernels.paged_attention.reference import paged_attention_reference
from jaxpaged.program import Programs
from tests.engine.family import FULL, PARAMS, PROMPTS, core_of, in_flight, sibling
from tests.engine.tiny import CONFIG, GREEDY, drain, new_engine, prompt_of, tiny_decoder

HYBRID = replace(CONFIG, sliding_windows=(9, None))


def pool_bytes(engine: Engine) -> bytes:
    pool = core_of(engine).runner.state.pool
    return np.asarray(pool.k).tobytes() + np.asarray(pool.v).tobytes()


def run_all(engine: Engine, *, probe: bool) -> dict[str, list[int]]:
    """The tokens of requests that preempt each other and share a prefix, measured after every step or not."""
    engine.reset_prefix_cache()
    for index, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True)):
        engine.add_request(str(index), prompt, params)
    engine.add_request("same", PROMPTS[0], PARAMS[0].clone(n=2))
    found = {}
    while engine.has_unfinished_requests:
        for output in engine.step():
            found[output.request_id] = [t for c in output.outputs for t in c.token_ids]
        if probe:
            seconds = engine.measure_attention(1)
            assert (seconds is None) == (not core_of(engine).scheduler.running)
            assert seconds is None or 0 < seconds < 60
        engine.check_invariants()
    return found


def test_nothing_is_different_for_it(either: Engine) -> None:
    before = either.stats().num_compiles
    wanted = run_all(either, probe=False)
    compiles, preemptions = either.stats().num_compiles - before, either.stats().num_preemptions
    assert run_all(either, probe=True) == wanted
    assert either.stats().num_compiles - before == compiles  # its own program is not among them
    assert either.stats().num_preemptions > preemptions


@pytest.mark.parametrize("ahead", [False, True], ids=["in step", "ahead"])
def test_the_pool_stays_as_it_is(ahead: bool) -> None:
    with sibling(async_scheduling=ahead, **FULL) as engine:
        for index in range(3):
            engine.add_request(str(index), prompt_of(9 + index), GREEDY)
        for _ in range(3):
            engine.step()
        assert in_flight(engine) == ahead
        before, state = pool_bytes(engine), core_of(engine).runner.state
        assert engine.measure_attention() is not None
        assert in_flight(engine) == ahead
        assert core_of(engine).runner.state is state
        assert pool_bytes(engine) == before
        assert len(drain(engine)) == 3


def test_none_when_nothing_runs() -> None:
    with sibling() as engine:
        assert engine.measure_attention() is None
        assert core_of(engine).runner._probe is not None  # but it is compiled
        engine.add_request("waits", prompt_of(5), GREEDY)
        assert engine.measure_attention() is None
        engine.step()
        assert engine.measure_attention() is not None
        drain(engine)
        assert engine.measure_attention() is None


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, AttentionBatch]]:
    """What the probe hands to its program: how many rows are real, and the batch."""
    found = []
    make = AttentionProbe._batch

    def note(self: AttentionProbe, requests: Any) -> AttentionBatch:
        batch = make(self, requests)
        found.append((len(requests), batch))
        return batch

    monkeypatch.setattr(AttentionProbe, "_batch", note)
    return found


def test_it_measures_the_batch_that_runs(asked: list[tuple[int, AttentionBatch]]) -> None:
    with sibling(num_scheduler_steps=1) as engine:
        lengths = [5, 9, 14]
        for length in lengths:
            engine.add_request(str(length), prompt_of(length), GREEDY)
        for _ in range(5):
            engine.step()
        assert engine.measure_attention() is not None
        count, batch = asked[-1]
        running = core_of(engine).scheduler.running
        assert count == len(running) == 3
        expected = [request.num_computed_tokens for request in running]
        assert all(a >= b for a, b in zip(expected, lengths, strict=True))
        assert np.asarray(batch.seq_lens).tolist() == [*expected, 0, 0, 0, 0, 0]
        assert np.asarray(batch.positions).tolist() == [*(n - 1 for n in expected), 0, 0, 0, 0, 0]
        assert np.asarray(batch.query_start_loc).tolist() == [0, 1, 2, 3, 3, 3, 3, 3, 3]
        assert np.asarray(batch.rows).tolist() == [0, 1, 2, 0, 0, 0, 0, 0]
        for row, request in enumerate(running):
            table = np.asarray(batch.block_tables)[row]
            assert table[: len(request.table)].tolist() == request.table.ids
            assert not table[len(request.table) :].any()
        drain(engine)


@pytest.mark.parametrize(
    ("config", "variant"),
    [(CONFIG, None), (CONFIG, AttentionVariant(logit_soft_cap=2.0, sliding_window=7)), (HYBRID, None)],
    ids=["plain", "variant", "hybrid"],
)
def test_its_program_is_the_attention_of_the_first_layer(
    config: Any, variant: AttentionVariant | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the variant that the model's first layer asks for, below the user's, in the first layer's place."""
    layers: list[tuple[int, AttentionVariant]] = []
    attend = Programs.attend

    def note(self: Programs, q: Any, pool: Any, layer: int, batch: Any, own: Any, user: Any) -> jax.Array:
        layers.append((layer, own))
        return attend(self, q, pool, layer, batch, own, user)

    monkeypatch.setattr(Programs, "attend", note)
    sizes = {"max_num_seqs": 2, "max_num_batched_tokens": 16}
    with new_engine(config, variant=variant, **sizes) as engine:
        engine.add_request("x", prompt_of(14), GREEDY)
        engine.step()
        layers_of_step = list(layers)
        layers.clear()
        assert engine.measure_attention() is not None
        ((layer, own),) = layers
        assert (layer, vars(own)) == next((n, vars(v)) for n, v in layers_of_step if n == 0)
        runner = core_of(engine).runner
        probe, pool = runner._probe, runner.state.pool
        assert probe is not None
        batch = probe._batch(core_of(engine).scheduler.running)
        q = jax.random.normal(jax.random.key(0), probe._queries.shape)
        own_window = tiny_decoder(config).layers[0].sliding_window
        merged = variant or AttentionVariant(sliding_window=own_window)
        expected = paged_attention_reference(q, pool, 0, batch, merged)
        result = probe._program(q, pool, batch, probe._operands)
        np.testing.assert_allclose(result[0], expected[0], rtol=2e-5, atol=2e-5)


def test_it_compiles_once_and_also_in_a_warm_engine(compiled: list[str]) -> None:
    with new_engine(max_num_seqs=1, max_num_batched_tokens=2, warmup=True) as engine:
        before = engine.stats().num_compiles
        assert engine.measure_attention() is None
        compiled.clear()
        engine.add_request("x", prompt_of(5), GREEDY)
        while engine.has_unfinished_requests:
            engine.step()
            engine.measure_attention()
        assert compiled == []
        assert engine.stats().num_compiles == before


def test_the_time_is_the_median_of_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with sibling() as engine:
        engine.add_request("x", prompt_of(5), GREEDY)
        engine.step()
        assert engine.measure_attention() is not None
        ticks = iter([0.0, 1.0, 10.0, 15.0, 20.0, 22.0])
        monkeypatch.setattr(attention_probe, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
        assert engine.measure_attention(3) == 2.0
        monkeypatch.undo()
        drain(engine)


def test_the_step_under_way_is_not_in_the_time_nor_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool is waited for before the clock starts; the step's own time holds the measuring, and is left out."""
    learned: list[int] = []
    with sibling(async_scheduling=True, num_host_blocks=8, num_scheduler_steps=1) as engine:
        cost = core_of(engine).scheduler.preemption.cost
        assert cost is not None
        monkeypatch.setattr(cost, "observe_step", lambda num_tokens, seconds: learned.append(num_tokens))
        engine.add_request("x", prompt_of(3), GREEDY)
        for _ in range(3):
            engine.step()
        count = len(learned)
        events: list[str] = []
        wait, measure = jax.block_until_ready, AttentionProbe.measure

        def note_wait(tree: Any) -> Any:
            events.append("wait" if tree is core_of(engine).runner.state else "other")
            return wait(tree)

        def note_measure(self: AttentionProbe, pool: KVPool, requests: Any, repeats: int) -> float:
            events.append("measure")
            return measure(self, pool, requests, repeats)

        monkeypatch.setattr(jax, "block_until_ready", note_wait)
        monkeypatch.setattr(AttentionProbe, "measure", note_measure)
        engine.measure_attention(2)
        assert next(event for event in events if event != "other") == "wait"
        assert "measure" in events
        engine.step()
        assert len(learned) == count
        engine.step()
        assert len(learned) == count + 1
        monkeypatch.undo()
        drain(engine)


def test_a_lost_pool_is_the_next_steps_business() -> None:
    with sibling() as engine:
        engine.add_request("x", prompt_of(5), GREEDY)
        engine.step()
        core_of(engine).runner.state.pool.k.delete()
        assert engine.measure_attention() is None
        assert drain(engine)["x"].error is not None


@pytest.mark.parametrize("repeats", [0, -1, True, 1.5, None, "3"])
def test_a_wrong_number_of_repeats(engine: Engine, repeats: Any) -> None:
    with pytest.raises(InvalidRequestError, match="repeats"):
        engine.measure_attention(repeats)


def test_it_leaves_nothing_behind() -> None:
    before = len(jax.live_arrays())
    engine = new_engine(max_num_seqs=1, max_num_batched_tokens=2)
    engine.add_request("x", prompt_of(2), GREEDY)
    engine.step()
    assert engine.measure_attention() is not None
    during = len(jax.live_arrays())
    for _ in range(5):
        engine.measure_attention()
    assert len(jax.live_arrays()) == during
    engine.close()
    assert len(jax.live_arrays()) == before
    with pytest.raises(EngineClosedError):
        engine.measure_attention()
