"""An engine that serves event loops from its start to its end, in good times and in bad."""

import asyncio
import contextlib
import gc
import threading

import pytest

from jaxpaged import Engine
from jaxpaged.serve.async_engine import AsyncEngine, OutputStream
from jaxpaged.serve.engine_state import EngineState
from jaxpaged.serve.engine_thread import EngineDeadError, EngineDrainingError
from tests.engine.tiny import dense_greedy, prompt_of
from tests.serve.asynchronous import TIMEOUT, asynchronous, until
from tests.serve.served_engines import DELTA, LONG, Broken, assert_clean, break_steps, poisoned, tiny
from tests.serve.serving import assert_idle, serving, standing, tokens_of


@asynchronous
async def test_draining_ends_what_is_there() -> None:
    async with serving() as engine:
        streams = [engine.generate(prompt_of(9, seed=i), DELTA) for i in range(12)]
        drained = asyncio.create_task(engine.drain())
        await until(lambda: engine.state is EngineState.DRAINING)
        with pytest.raises(EngineDrainingError):
            engine.generate(prompt_of(5), DELTA)
        await drained
        assert engine.num_unfinished == 0
        for seed, stream in enumerate(streams):
            assert await tokens_of(stream) == dense_greedy(prompt_of(9, seed=seed), 16)
        assert_clean(await engine.stats())


@asynchronous
async def test_who_does_not_end_in_time_is_aborted() -> None:
    async with serving() as engine:
        streams = [engine.generate(prompt_of(5, seed=i), LONG) for i in range(2)]
        for stream in streams:
            await anext(stream)
        async with standing(engine):
            waiting = engine.generate(prompt_of(5), LONG)
            drained = asyncio.create_task(engine.drain(timeout=0.01))
            await asyncio.wait([drained], timeout=0.05)
        await drained
        for stream in streams:
            assert [c.finish_reason async for output in stream for c in output.outputs][-1] == "abort"
        with pytest.raises(EngineDrainingError):
            await tokens_of(waiting)
        assert_clean(await engine.stats())


@asynchronous
async def test_who_gives_up_waiting_for_a_drain_leaves_it_to_others() -> None:
    async with serving() as engine:
        async with standing(engine):
            stream = engine.generate(prompt_of(5), DELTA)
            impatient, patient = (asyncio.create_task(engine.drain()) for _ in range(2))
            await until(lambda: engine.state is EngineState.DRAINING)
            impatient.cancel()
            hurried = asyncio.create_task(engine.drain(timeout=TIMEOUT))
        await asyncio.gather(patient, hurried)
        assert await tokens_of(stream) == dense_greedy(prompt_of(5), 16)
        assert impatient.cancelled()


@asynchronous
async def test_closing_tells_everybody_who_waits() -> None:
    engine = AsyncEngine(tiny())
    await engine.wait_ready()
    running = [engine.generate(prompt_of(5, seed=i), LONG) for i in range(10)]
    await anext(running[0])
    tasks = [asyncio.create_task(tokens_of(stream)) for stream in running]
    await asyncio.gather(engine.close(), engine.close())
    for found in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(found, EngineDeadError)
    assert engine.state is EngineState.CLOSED
    for use in (engine.wait_ready, engine.stats, lambda: engine.abort("x")):
        with pytest.raises(EngineDeadError, match="closed"):
            await use()
    with pytest.raises(EngineDeadError, match="closed"):
        engine.generate(prompt_of(5))
    with pytest.raises(EngineDeadError, match="closed"):
        _ = engine.config
    await engine.drain()
    await engine.close()


@asynchronous
async def test_an_engine_that_cannot_start_tells_everybody() -> None:
    def make(tell: object) -> Engine:
        raise Broken("no weights")

    engine = AsyncEngine(make)
    waiting = [asyncio.create_task(engine.wait_ready()) for _ in range(3)]
    for found in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(found, EngineDeadError)
        assert isinstance(found.__cause__, Broken)
    with pytest.raises(EngineDeadError, match="no weights"):
        async with engine:
            pass
    assert engine.state is EngineState.DEAD
    assert isinstance(engine.error, Broken)
    await engine.close()


@asynchronous
async def test_who_gives_up_waiting_for_the_start_leaves_it_to_others() -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def make(tell: object) -> Engine:
        begun.set()
        assert goes_on.wait(TIMEOUT)
        return tiny()

    engine = AsyncEngine(make)
    patient = asyncio.create_task(engine.wait_ready())
    await until(begun.is_set)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await engine.wait_ready()
    goes_on.set()
    await patient
    assert engine.state is EngineState.READY
    assert engine.config.block_size == 4
    assert engine.model_config.vocab_size == 384
    assert engine.tokenizer is not None
    assert await tokens_of(engine.generate(prompt_of(5), DELTA)) == dense_greedy(prompt_of(5), 16)
    await engine.close()


@asynchronous
async def test_a_failure_comes_after_what_was_there_before_it() -> None:
    """Whether its reader is fast or slow."""
    async with serving() as engine:
        steps = iter(range(10**6))
        await engine.run(lambda e: break_steps(e, lambda step: poisoned(step) and next(steps) == 6))
        fast = engine.generate(prompt_of(5), LONG, request_id="poison-1")
        slow = engine.generate(prompt_of(5), LONG, request_id="poison-2")
        for stream in (slow, fast):
            tokens: list[int] = []
            with contextlib.suppress(Broken):
                while True:
                    tokens += (await anext(stream)).outputs[0].token_ids
            assert tokens == dense_greedy(prompt_of(5), 110)[: len(tokens)]
            assert len(tokens) >= 5
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
        assert await tokens_of(engine.generate(prompt_of(5), DELTA)) == dense_greedy(prompt_of(5), 16)


@asynchronous
async def test_an_engine_that_dies_tells_everybody() -> None:
    async with serving() as engine:
        streams = [engine.generate(prompt_of(5, seed=i), LONG) for i in range(60)]
        tasks = [asyncio.create_task(tokens_of(stream)) for stream in streams]
        await engine.run(lambda e: break_steps(e, lambda step: True))
        found = await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: engine.state is EngineState.DEAD)
        assert {type(each) for each in found} <= {Broken, EngineDeadError}
        assert isinstance(engine.error, Broken)
        assert engine.num_unfinished == 0
        with pytest.raises(EngineDeadError, match="no step today"):
            engine.generate(prompt_of(5))
        with pytest.raises(EngineDeadError, match="no step today"):
            await engine.wait_ready()


def test_event_loops_in_several_threads_share_an_engine() -> None:
    engine = AsyncEngine(tiny())
    failures: list[BaseException] = []

    async def use(thread: int) -> None:
        async with asyncio.timeout(TIMEOUT):
            await engine.wait_ready()
            prompts = [prompt_of(5 + thread, seed=seed) for seed in range(6)]
            found = await asyncio.gather(*(tokens_of(engine.generate(prompt, DELTA)) for prompt in prompts))
            assert found == [dense_greedy(prompt, 16) for prompt in prompts]

    def work(thread: int) -> None:
        try:
            for _ in range(2):
                asyncio.run(use(thread))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert failures == []
    asyncio.run(engine.close())


def test_an_event_loop_that_is_closed_does_not_disturb_the_engine() -> None:
    engine = AsyncEngine(tiny())
    kept = []

    async def leave_in_the_middle() -> None:
        await engine.wait_ready()
        kept.append(engine.generate(prompt_of(5), LONG))
        await anext(kept[-1])
        asyncio.create_task(tokens_of(engine.generate(prompt_of(5), LONG)))  # noqa: RUF006

    async def use() -> None:
        async with asyncio.timeout(TIMEOUT):
            assert await tokens_of(engine.generate(prompt_of(5), DELTA)) == dense_greedy(prompt_of(5), 16)
            await assert_idle(engine)

    for _ in range(2):
        asyncio.run(leave_in_the_middle())
        asyncio.run(use())
    kept.clear()
    asyncio.run(use())
    asyncio.run(engine.close())


def test_a_stream_may_be_collected_in_any_thread() -> None:
    """In the engine's own, too, while that delivers or takes requests in."""
    engine = AsyncEngine(tiny())

    class Cycle:
        """Only the garbage collector finds it."""

        def __init__(self, stream: OutputStream) -> None:
            self.stream, self.itself = stream, self

    class Collects:
        def stepped(self, record: object) -> None:
            gc.collect(0)

        ended = gaps = stepped

    async def use() -> None:
        await engine.wait_ready()
        engine.add_listener(Collects())
        for seed in range(30):
            Cycle(engine.generate(prompt_of(5, seed=seed), LONG))
            if seed % 10 == 0:
                await anext(engine.generate(prompt_of(5, seed=seed), LONG))
        assert await tokens_of(engine.generate(prompt_of(5), DELTA)) == dense_greedy(prompt_of(5), 16)
        gc.collect()
        await assert_idle(engine)
        await engine.close()

    gc.collect()
    gc.disable()
    try:
        asynchronous(use)()
    finally:
        gc.enable()
    assert engine.state is EngineState.CLOSED
