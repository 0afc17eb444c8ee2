"""An engine that serves tells metrics and TensorBoard all that happens, and scrapes do not disturb it."""

import asyncio
from pathlib import Path

import pytest

from jaxpaged import RequestOutputKind, SamplingParams
from jaxpaged.serve.async_engine import AsyncEngine
from jaxpaged.serve.engine_state import EngineState
from jaxpaged.serve.listeners import Listener
from jaxpaged.serve.metrics.prometheus import ENGINE_STATES, PrometheusMetrics
from jaxpaged.serve.metrics.tensorboard import TensorBoardWriter
from tests.engine.tiny import new_engine, prompt_of
from tests.serve.metrics_exposition import OPENMETRICS, samples, value

NUM_REQUESTS, NUM_TOKENS = 6, 12
DELTA = SamplingParams(
    temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, output_kind=RequestOutputKind.DELTA
)


def test_every_state_of_an_engine_can_be_told() -> None:
    assert tuple(state.value for state in EngineState) == ENGINE_STATES
    metrics = PrometheusMetrics("m")
    for state in EngineState:
        metrics.set_state(state)
        assert value(samples(metrics, None), "engine_state", state=state.value) == 1


@pytest.mark.timeout(120)
def test_streams_are_counted_token_by_token_while_they_are_scraped(tmp_path: Path) -> None:
    metrics = PrometheusMetrics("tiny")
    board = TensorBoardWriter(tmp_path, interval=3600.0)
    listeners: list[Listener] = [metrics, board]

    async def serve() -> None:
        async with AsyncEngine(new_engine()) as engine:
            for listener in listeners:
                engine.add_listener(listener)
            await engine.wait_ready()
            metrics.set_engine(engine.config)

            async def stream(number: int) -> None:
                async for _ in engine.generate(prompt_of(9, number), DELTA):
                    await asyncio.to_thread(metrics.render, await engine.stats(), OPENMETRICS)

            await asyncio.gather(*(stream(number) for number in range(NUM_REQUESTS)))
            found = samples(metrics, await engine.stats())
        assert value(found, "request_success_total", finished_reason="length") == NUM_REQUESTS
        assert value(found, "generation_tokens_total") == NUM_REQUESTS * NUM_TOKENS
        assert value(found, "inter_token_latency_seconds_count") == NUM_REQUESTS * (NUM_TOKENS - 1)
        assert value(found, "inter_token_latency_seconds_sum") > 0
        assert value(found, "time_to_first_token_seconds_count") == NUM_REQUESTS
        assert value(found, "iteration_tokens_total_count") == value(found, "steps_total")
        assert value(found, "iteration_tokens_total_sum") == value(found, "computed_tokens_total")
        assert value(found, "num_requests_running") == 0
        assert value(found, "cache_config_info", dtype="float32") == 1

    asyncio.run(serve())
    metrics.check_invariants()
    board.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 1000
