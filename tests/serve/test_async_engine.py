"""Streams of an engine: the same tokens as offline, and nothing left behind however they end."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from jaxpaged import BeamSearchParams, RequestOutput, RequestOutputKind, SamplingParams
from jaxpaged.errors import InvalidRequestError, UnknownRequestError
from jaxpaged.serve.async_engine import AsyncEngine, OutputStream
from jaxpaged.serve.engine_thread import QueueFullError
from tests.engine.family import LENGTHS, PROMPTS
from tests.engine.tiny import GREEDY, dense_greedy, prompt_of
from tests.serve.asynchronous import TIMEOUT, asynchronous, until
from tests.serve.served_engines import DELTA, LONG, check, tiny
from tests.serve.serving import assert_idle, serving, standing, tokens_of

# With and without a step that is with the device while everything else happens.
MODES = pytest.mark.parametrize("ahead", [False, True], ids=["in step", "ahead"])


@MODES
@asynchronous
async def test_many_at_once_say_what_they_say_offline(ahead: bool) -> None:
    """Greedy tokens and seeded samples, streamed and at the end, text and several completions."""
    params = [GREEDY.clone(max_tokens=count, seed=i) for i, (_, count) in enumerate(LENGTHS)]
    params[2] = params[2].clone(temperature=1.0, logprobs=2)
    params[3] = params[3].clone(temperature=0.8, n=3)
    params[5] = params[5].clone(ignore_eos=False)
    with tiny() as offline:
        wanted = offline.generate(PROMPTS, params)
        beams = BeamSearchParams(beam_width=3, max_tokens=8)
        (found,) = offline.beam_search(prompt_of(12), beams)

    async def streamed(engine: AsyncEngine, i: int, kind: RequestOutputKind) -> None:
        outputs = [output async for output in engine.generate(PROMPTS[i], params[i].clone(output_kind=kind))]
        for index, completion in enumerate(wanted[i].outputs):
            pieces = [c for output in outputs for c in output.outputs if c.index == index]
            assert [t for piece in pieces for t in piece.token_ids] == completion.token_ids
            assert "".join(piece.text for piece in pieces) == completion.text
            assert pieces[-1].finish_reason == completion.finish_reason
            if completion.logprobs is not None:
                shown = [set(each) for piece in pieces for each in piece.logprobs or []]
                assert shown == [set(each) for each in completion.logprobs]
        assert outputs[-1].finished

    async with serving(async_scheduling=ahead) as engine, asyncio.TaskGroup() as group:
        for _ in range(2):
            for i in range(len(PROMPTS)):
                for kind in RequestOutputKind:
                    group.create_task(streamed(engine, i, kind))
        (last,) = [output async for output in engine.generate(prompt_of(12), beams)]
        assert [c.token_ids for c in last.outputs] == [c.token_ids for c in found.outputs]


async def cancel_the_task(stream: OutputStream) -> None:
    task = asyncio.create_task(tokens_of(stream))
    await until(lambda: stream._waiter is not None)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def cancel_the_wait(stream: OutputStream) -> None:
    task = asyncio.create_task(stream.wait(TIMEOUT))
    await until(lambda: stream._waiter is not None or task.done())
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    stream.cancel()  # it may have had something to tell already


async def close_the_stream(stream: OutputStream) -> None:
    await stream.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    await stream.aclose()


async def leave_the_loop(stream: OutputStream) -> None:
    async with contextlib.aclosing(stream):
        async for _ in stream:
            break


async def drop_the_stream(stream: OutputStream) -> None:
    """Its caller does, too."""


WAYS = [cancel_the_task, cancel_the_wait, close_the_stream, leave_the_loop, drop_the_stream]


@MODES
@pytest.mark.parametrize("way", WAYS)
@asynchronous
async def test_however_a_stream_ends_its_blocks_are_free_at_once(
    way: Callable[..., Any], ahead: bool
) -> None:
    async with serving(async_scheduling=ahead) as engine:
        other = engine.generate(prompt_of(9), DELTA)
        stream = engine.generate(prompt_of(30), LONG)
        await anext(stream)
        await way(stream)
        del stream
        held = await engine.run(lambda engine: engine.block_tables())
        assert set(held) <= {other.request_id}
        assert await tokens_of(other) == dense_greedy(prompt_of(9), 16)
        await assert_idle(engine)


@pytest.mark.parametrize("way", [cancel_the_task, close_the_stream, drop_the_stream])
@asynchronous
async def test_a_request_may_be_cancelled_before_the_engine_has_it(way: Callable[..., Any]) -> None:
    async with serving() as engine:
        async with standing(engine):
            other = engine.generate(prompt_of(9), DELTA)
            stream = engine.generate(prompt_of(30), LONG)
            await way(stream)
            del stream
            assert engine.num_unfinished == 2
        assert await tokens_of(other) == dense_greedy(prompt_of(9), 16)
        stats = await engine.stats()
        assert stats.num_prompt_tokens == 9, "the engine never saw the other one"


@MODES
@asynchronous
async def test_a_hundred_are_cancelled_in_the_middle_and_the_others_notice_nothing(ahead: bool) -> None:
    """Their ids are used again at once; some requests go on all the while."""

    async def cut_short(engine: AsyncEngine, number: int) -> None:
        for again in range(10):
            stream = engine.generate(prompt_of(20, seed=again), LONG, request_id=f"cut-{number}")
            for _ in range(1 + (number + again) % 4):
                await anext(stream)
            stream.cancel()

    async def whole(engine: AsyncEngine, number: int) -> None:
        for seed in range(3):
            prompt = prompt_of(5 + number, seed=seed)
            assert await tokens_of(engine.generate(prompt, DELTA)) == dense_greedy(prompt, 16)

    async with serving(async_scheduling=ahead) as engine:
        async with asyncio.TaskGroup() as group:
            for number in range(10):
                group.create_task(cut_short(engine, number))
            for number in range(4):
                group.create_task(whole(engine, number))
        await assert_idle(engine)
        stats = await engine.stats()
        assert stats.finished["abort"] == 100


@asynchronous
async def test_a_request_is_aborted_by_its_id_and_tells_its_reader() -> None:
    async with serving() as engine:
        stream = engine.generate(prompt_of(9), LONG, request_id="mine")
        assert stream.request_id == "mine"
        first = await anext(stream)
        await engine.abort("mine")
        outputs = [first] + [output async for output in stream]
        assert outputs[-1].outputs[0].finish_reason == "abort"
        tokens = [token for output in outputs for token in output.outputs[0].token_ids]
        assert tokens == dense_greedy(prompt_of(9), 110)[: len(tokens)]
        with pytest.raises(UnknownRequestError):
            await engine.abort("mine")
        stream = engine.generate(prompt_of(9), LONG, request_id="mine")
        await engine.abort("mine")
        assert [c.finish_reason async for output in stream for c in output.outputs][-1] == "abort"


@asynchronous
async def test_ids_that_are_made_are_those_of_nobody_else() -> None:
    async with serving() as engine:
        streams = [engine.generate(prompt_of(5), DELTA) for _ in range(3)]
        async with standing(engine):
            same = [engine.generate(prompt_of(5), DELTA, request_id="same") for _ in range(2)]
        assert len({stream.request_id for stream in streams}) == 3
        for stream in (*streams, same[0]):
            assert await tokens_of(stream) == dense_greedy(prompt_of(5), 16)
        with pytest.raises(InvalidRequestError, match="same"):
            await anext(same[1])
        with pytest.raises(StopAsyncIteration):
            await anext(same[1])


@asynchronous
async def test_who_is_more_urgent_goes_first() -> None:
    async with serving(scheduling_policy="priority", max_num_seqs=8) as engine:
        ends: list[int] = []

        async def wait_for(stream: OutputStream, priority: int) -> None:
            await tokens_of(stream)
            ends.append(priority)

        async with standing(engine):
            priorities = [i % 4 for i in range(32)]
            streams = [
                engine.generate(prompt_of(20, seed=i), DELTA, priority=p) for i, p in enumerate(priorities)
            ]
            tasks = [asyncio.create_task(wait_for(s, p)) for s, p in zip(streams, priorities, strict=True)]
        await asyncio.gather(*tasks)
        assert sum(ends[:8]) < sum(ends[-8:])
        assert set(ends[:4]) <= {0, 1}
        assert set(ends[-4:]) <= {2, 3}


@asynchronous
async def test_deadlines_reach_the_engine() -> None:
    async with serving() as engine:
        late = engine.generate(prompt_of(9), LONG, deadline=1e-6)
        assert [c.finish_reason async for output in late for c in output.outputs][-1] == "timeout"
        with pytest.raises(InvalidRequestError, match="max_queue_time"):
            await anext(engine.generate(prompt_of(9), LONG, max_queue_time=-1.0))
        with pytest.raises(InvalidRequestError, match="tenant"):
            await anext(engine.generate(prompt_of(9), LONG, tenant=3))  # type: ignore[arg-type]


@asynchronous
async def test_a_full_queue_refuses_at_the_door() -> None:
    async with serving(max_queue_length=0) as engine:
        async with standing(engine):
            streams = [
                engine.generate(prompt_of(5), DELTA.clone(n=4, temperature=1.0, seed=1)) for _ in range(2)
            ]
            with pytest.raises(QueueFullError) as refused:
                engine.generate(prompt_of(5), DELTA)
            assert refused.value.retry_after >= 1.0
            assert engine.num_unfinished == 8
        for stream in streams:
            assert [output.finished async for output in stream][-1]
        assert await tokens_of(engine.generate(prompt_of(5), DELTA)) == dense_greedy(prompt_of(5), 16)


@asynchronous
async def test_a_slow_reader_gets_everything_in_few_pieces() -> None:
    async with serving() as engine:
        params = LONG.clone(n=2, temperature=1.0, seed=5, logprobs=1, max_tokens=40)
        whole = [output async for output in engine.generate(prompt_of(5), params)]
        slow = engine.generate(prompt_of(5), params)
        first = await anext(slow)
        await until(lambda: slow._ended)
        rest = await anext(slow)
        with pytest.raises(StopAsyncIteration):
            await anext(slow)
        assert rest.finished
        assert rest.metrics is not None
        for index in range(2):
            pieces = [c for output in whole for c in output.outputs if c.index == index]
            found = [c for output in (first, rest) for c in output.outputs if c.index == index]
            assert [t for c in found for t in c.token_ids] == [t for c in pieces for t in c.token_ids]
            assert "".join(c.text for c in found) == "".join(c.text for c in pieces)
            assert sum(len(c.logprobs or []) for c in found) == 40
            assert found[-1].finish_reason == pieces[-1].finish_reason == "length"


@asynchronous
async def test_waiting_with_a_limit_loses_nothing() -> None:
    async with serving() as engine:
        async with standing(engine):
            stream = engine.generate(prompt_of(5), DELTA)
            assert not await stream.wait(0.01)
            assert not await stream.wait(0.0)
        tokens: list[int] = []
        while await stream.wait(TIMEOUT):
            stream.raise_error()
            try:
                output = await anext(stream)
            except StopAsyncIteration:
                break
            tokens += output.outputs[0].token_ids
        assert tokens == dense_greedy(prompt_of(5), 16)
        wrong = engine.generate([10**6], DELTA)
        assert await wrong.wait(TIMEOUT)
        for _ in range(2):
            with pytest.raises(InvalidRequestError):
                wrong.raise_error()


@asynchronous
async def test_a_stream_has_one_reader_at_a_time() -> None:
    async with serving() as engine:
        async with standing(engine):
            stream = engine.generate(prompt_of(5), DELTA)
            reader = asyncio.create_task(tokens_of(stream))
            await until(lambda: stream._waiter is not None)
            with pytest.raises(RuntimeError, match="another task"):
                await anext(stream)
        assert await reader == dense_greedy(prompt_of(5), 16)


@asynchronous
async def test_who_waits_for_a_stream_that_is_closed_is_told() -> None:
    async with serving() as engine, standing(engine):
        stream = engine.generate(prompt_of(5), DELTA)
        reader = asyncio.create_task(tokens_of(stream))
        await until(lambda: stream._waiter is not None)
        stream.cancel()
        assert await reader == []


@asynchronous
async def test_functions_run_between_steps() -> None:
    async with serving() as engine:
        streams = [engine.generate(prompt_of(20, seed=i), DELTA) for i in range(8)]
        for _ in range(10):
            assert (await engine.run(check)).num_blocks == 39
        with pytest.raises(ZeroDivisionError):
            await engine.run(lambda engine: 1 / 0)
        with pytest.raises(RuntimeError, match="StopIteration"):
            await engine.run(lambda engine: next(iter(())))
        for seed, stream in enumerate(streams):
            assert await tokens_of(stream) == dense_greedy(prompt_of(20, seed=seed), 16)
        assert engine.stats_from_thread(TIMEOUT) is not None


@asynchronous
async def test_parameters_are_the_callers_own() -> None:
    """What is not given is as in SamplingParams, but for showing what is new."""
    async with serving() as engine:
        params = SamplingParams(temperature=0.0, ignore_eos=True)
        assert await tokens_of(engine.generate(prompt_of(5), params)) == dense_greedy(prompt_of(5), 16)
        assert params.output_kind is RequestOutputKind.CUMULATIVE
        outputs: list[RequestOutput] = [output async for output in engine.generate("def main(")]
        assert outputs[0].prompt == "def main("
        assert sum(len(output.outputs[0].token_ids) for output in outputs) <= 16
