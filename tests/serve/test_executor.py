"""Requests go in by number, responses come out to whichever thread asks, and nothing grows without bound."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from jaxpaged import BeamSearchParams, Engine, RequestOutputKind, SamplingParams
from jaxpaged.errors import EngineClosedError, InvalidRequestError, PromptTooLongError, UnknownRequestError
from jaxpaged.serve.engine_thread import EngineDeadError, EngineDrainingError, QueueFullError
from jaxpaged.serve.executor import Executor, ExecutorRequest, Response
from tests.engine.tiny import GREEDY, SIZES, dense_greedy, prompt_of, tiny_decoder
from tests.serve.asynchronous import TIMEOUT, wait_until
from tests.serve.served_engines import (
    DELTA,
    LONG,
    Broken,
    assert_clean,
    break_steps,
    check,
    held,
    tiny,
)


@pytest.fixture
def executor() -> Iterator[Executor]:
    with Executor(tiny()) as found:
        yield found
        wait_until(lambda: not found._thread.num_unfinished)
        assert_clean(found._thread.call(check).result(TIMEOUT))
        found._responses.check_invariants()


def tokens_of(*responses: Response) -> list[int]:
    """Of responses of one request, which has not failed."""
    outputs = [response.output for response in responses]
    assert all(output is not None for output in outputs)
    assert [response.error for response in responses] == [None] * len(responses)
    return [token for output in outputs if output is not None for token in output.outputs[0].token_ids]


def reason_of(response: Response) -> str | None:
    assert response.output is not None
    return response.output.outputs[0].finish_reason


def test_a_request_has_one_response_unless_it_is_streamed(executor: Executor) -> None:
    """As with ``streaming=False``, whatever the default of SamplingParams is."""
    for params in (GREEDY, GREEDY.clone(output_kind=RequestOutputKind.FINAL_ONLY)):
        number = executor.enqueue_request(prompt_of(5), params)
        (response,) = executor.await_responses(number, TIMEOUT)
        assert response.request_id == number
        assert response.is_final
        assert tokens_of(response) == dense_greedy(prompt_of(5), 16)
        assert response.output is not None
        assert response.output.finished


def test_a_streamed_request_has_many(executor: Executor) -> None:
    number = executor.enqueue_request(prompt_of(5), LONG)
    responses = []
    while not (responses and responses[-1].is_final):
        arrived = executor.await_responses(number, TIMEOUT)
        assert len(arrived) == 1
        responses += arrived
    assert len(responses) > 1
    assert tokens_of(*responses) == dense_greedy(prompt_of(5), 110)
    assert not any(response.is_final for response in responses[:-1])


def test_ids_count_up_and_responses_come_in_the_order_asked_for(executor: Executor) -> None:
    prompts = [prompt_of(3 + i % 9, seed=i) for i in range(30)]
    ids = [executor.enqueue_request(prompt, GREEDY) for prompt in prompts]
    assert ids == list(range(1, 31))
    found = executor.await_responses(ids[::-1], TIMEOUT)
    assert [response.request_id for (response,) in found] == ids[::-1]
    for (response,), prompt in zip(found[::-1], prompts, strict=True):
        assert tokens_of(response) == dense_greedy(prompt, 16)


def test_responses_of_any_request(executor: Executor) -> None:
    ids = executor.enqueue_requests(
        [ExecutorRequest(prompt=prompt_of(5, seed=i), params=GREEDY) for i in range(9)]
    )
    found: dict[int, Response] = {}
    while len(found) < 9:
        arrived = executor.await_responses(timeout=TIMEOUT)
        assert arrived
        found |= {response.request_id: response for response in arrived}
    assert sorted(found) == ids
    for seed, number in enumerate(ids):
        assert tokens_of(found[number]) == dense_greedy(prompt_of(5, seed=seed), 16)


def test_nothing_comes_in_time(executor: Executor) -> None:
    with held(executor._thread):
        number = executor.enqueue_request(prompt_of(5), GREEDY)
        for timeout in (0.0, 0.01, -1.0):
            assert executor.await_responses(number, timeout) == []
            assert executor.await_responses([number, number], timeout) == [[], []]
            assert executor.await_responses(timeout=timeout) == []
        assert executor.await_responses([], None) == []
        assert executor.get_num_responses_ready() == executor.get_num_responses_ready(number) == 0
    wait_until(lambda: executor.get_num_responses_ready(number))
    assert executor.get_num_responses_ready() == 1
    assert len(executor.await_responses(number, float("inf"))) == 1
    assert executor.get_num_responses_ready() == 0


def test_what_has_come_in_time_is_given_even_if_the_rest_has_not(executor: Executor) -> None:
    done = executor.enqueue_request(prompt_of(5), GREEDY)
    wait_until(lambda: executor.get_num_responses_ready(done))
    with held(executor._thread):
        waiting = executor.enqueue_request(prompt_of(5), GREEDY)
        (first,), second = executor.await_responses([done, waiting], 0.01)
        assert first.request_id == done
        assert second == []
    assert tokens_of(*executor.await_responses(waiting, TIMEOUT)) == dense_greedy(prompt_of(5), 16)


def test_what_is_not_there_or_was_taken_is_unknown(executor: Executor) -> None:
    number = executor.enqueue_request(prompt_of(5), GREEDY)
    assert len(executor.await_responses(number, TIMEOUT)) == 1
    for unknown in (number, 0, -1, 77, 10**30):
        for ask in (executor.await_responses, executor.get_num_responses_ready, executor.cancel_request):
            with pytest.raises(UnknownRequestError) as raised:
                ask(unknown)
            assert raised.value.value == unknown
    other = executor.enqueue_request(prompt_of(5), GREEDY)
    with pytest.raises(UnknownRequestError):
        executor.await_responses([other, number])
    assert tokens_of(*executor.await_responses(other, TIMEOUT)) == dense_greedy(prompt_of(5), 16)


def test_who_waits_for_what_another_takes_is_told(executor: Executor) -> None:
    with held(executor._thread), ThreadPoolExecutor(4) as pool:
        number, other = (executor.enqueue_request(prompt_of(5), GREEDY) for _ in range(2))
        takers = [pool.submit(executor.await_responses, number, TIMEOUT) for _ in range(2)]
        takers.append(pool.submit(executor.await_responses, [number], TIMEOUT))
        unread = executor._responses._requests[number]
        wait_until(lambda: unread.num_waiting == 3)
        executor.cancel_request(number)
        executor._responses.post([(unread.ticket, EngineDeadError("gone"))])
        errors = [taker.exception(TIMEOUT) for taker in takers]
    assert sum(error is None for error in errors) == 1
    assert sum(isinstance(error, UnknownRequestError) for error in errors) == 2
    assert len(executor.await_responses(other, TIMEOUT)) == 1


def test_many_threads(executor: Executor) -> None:
    """Some ask for their own requests, streamed or not, and some cancel them."""

    def work(thread: int) -> None:
        for again in range(4):
            prompt = prompt_of(4 + thread, seed=again)
            whole = executor.enqueue_request(prompt, GREEDY)
            cut = executor.enqueue_request(prompt, LONG)
            streamed = executor.enqueue_request(prompt, DELTA)
            executor.await_responses(cut, TIMEOUT)
            executor.cancel_request(cut)
            responses: list[Response] = []
            while not (responses and responses[-1].is_final):
                responses += executor.await_responses(streamed, TIMEOUT)
            assert tokens_of(*responses) == dense_greedy(prompt, 16)
            ((last,),) = executor.await_responses([whole], TIMEOUT)
            assert tokens_of(last) == dense_greedy(prompt, 16)
            while not last.is_final or last.request_id != cut:
                last = executor.await_responses(cut, TIMEOUT)[-1]
            assert reason_of(last) == "abort"

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, thread) for thread in range(8)]:
            future.result(TIMEOUT)
    assert executor.get_num_responses_ready() == 0


def test_cancelled_requests_have_a_last_response(executor: Executor) -> None:
    with held(executor._thread):
        waiting = executor.enqueue_request("def main", LONG)
        executor.cancel_request(waiting)
        executor.cancel_request(waiting)
    (response,) = executor.await_responses(waiting, TIMEOUT)
    assert reason_of(response) == "abort"
    running = executor.enqueue_request(prompt_of(5), LONG)
    first = executor.await_responses(running, TIMEOUT)
    executor.cancel_request(running)
    wait_until(lambda: executor._responses._requests[running].is_final)
    executor.cancel_request(running)
    last = executor.await_responses(running, TIMEOUT)
    assert reason_of(last[0]) == "abort"
    tokens = tokens_of(*first, *last)
    assert tokens == dense_greedy(prompt_of(5), 110)[: len(tokens)]


def test_what_nobody_has_read_is_one_response(executor: Executor) -> None:
    params = LONG.clone(n=2, temperature=1.0, seed=5, max_tokens=30)
    wanted = executor.enqueue_request(prompt_of(5), params.clone(output_kind=RequestOutputKind.FINAL_ONLY))
    (whole,) = executor.await_responses(wanted, TIMEOUT)
    number = executor.enqueue_request(prompt_of(5), params)
    wait_until(lambda: executor._responses._requests[number].is_final)
    assert executor.get_num_responses_ready(number) == 1
    (response,) = executor.await_responses(number, TIMEOUT)
    assert response.output is not None
    assert whole.output is not None
    assert response.output.outputs == whole.output.outputs


def test_of_what_nobody_asks_for_the_oldest_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    with Executor(tiny(), max_unread=3) as executor, ThreadPoolExecutor(1) as pool:
        with held(executor._thread):
            asked = executor.enqueue_requests([ExecutorRequest(prompt=prompt_of(5), params=GREEDY)] * 5)
            waiter = pool.submit(executor.await_responses, asked, TIMEOUT)
            wait_until(lambda: executor._responses._requests[asked[-1]].num_waiting)
        assert [len(responses) for responses in waiter.result(TIMEOUT)] == [1] * 5, "somebody waits for them"
        ids = []
        for seed in range(6):
            ids.append(executor.enqueue_request(prompt_of(5, seed=seed), GREEDY))
            wait_until(lambda: not executor._thread.num_unfinished)
        executor._thread.call(lambda engine: None).result(TIMEOUT)
        assert executor.get_num_responses_ready() == 3
        for number in ids[:3]:
            with pytest.raises(UnknownRequestError):
                executor.await_responses(number)
        for seed, (response,) in enumerate(executor.await_responses(ids[3:], TIMEOUT), start=3):
            assert tokens_of(response) == dense_greedy(prompt_of(5, seed=seed), 16)
        executor._responses.check_invariants()
    assert caplog.text.count("responses are dropped") == 1


def test_several_requests_are_taken_together_or_not_at_all() -> None:
    with Executor(tiny(), max_queue_length=0) as executor:
        some = [ExecutorRequest(prompt=prompt_of(5), params=GREEDY)] * 5
        with held(executor._thread):
            ids = executor.enqueue_requests(some)
            with pytest.raises(QueueFullError):
                executor.enqueue_requests(some)
            assert executor.can_enqueue_requests()
            more = executor.enqueue_requests(some[:3])
            assert not executor.can_enqueue_requests()
            with pytest.raises(QueueFullError) as refused:
                executor.enqueue_request(prompt_of(5), GREEDY)
            assert refused.value.retry_after >= 1.0
        assert executor.enqueue_requests([]) == []
        assert ids + more == sorted(ids + more)
        for (response,) in executor.await_responses(ids + more, TIMEOUT):
            assert tokens_of(response) == dense_greedy(prompt_of(5), 16)
        executor._responses.check_invariants()


WRONG: dict[str, dict[str, Any]] = {
    "params": {"params": {"max_tokens": 3}},
    "priority": {"priority": "high"},
    "tenant": {"tenant": 7},
    "cache_salt": {"cache_salt": 1.5},
    "deadline": {"deadline": 0},
    "max_queue_time": {"max_queue_time": -3.0},
    "prompt": {"prompt": ""},
    "logprobs": {"params": SamplingParams(logprobs=10**6)},
    "stop_token_ids": {"params": BeamSearchParams(beam_width=2, max_tokens=2, stop_token_ids=[10**6])},
}


@pytest.mark.parametrize("argument", WRONG)
def test_what_can_be_known_to_be_wrong_is_refused_before_anything_is_queued(
    executor: Executor, argument: str
) -> None:
    wrong = {"prompt": prompt_of(5), **WRONG[argument]}
    with pytest.raises(InvalidRequestError) as raised:
        executor.enqueue_requests([ExecutorRequest(prompt=prompt_of(5)), ExecutorRequest(**wrong)])
    assert raised.value.argument == argument
    with pytest.raises(InvalidRequestError):
        executor.enqueue_request(**wrong)
    with pytest.raises(InvalidRequestError):
        executor.enqueue_requests(["text"])  # type: ignore[list-item]
    assert executor._thread.num_unfinished == 0
    assert executor._responses._requests == {}


def test_what_the_engine_finds_wrong_comes_as_a_response(executor: Executor) -> None:
    ids = [executor.enqueue_request(prompt) for prompt in (prompt_of(64) * 2, [5, 10**6], {"text": "x"})]
    responses = [response for (response,) in executor.await_responses(ids, TIMEOUT)]
    assert isinstance(responses[0].error, PromptTooLongError)
    for response in responses:
        assert isinstance(response.error, InvalidRequestError)
        assert response.is_final
        assert response.output is None


def test_requests_are_handled_as_they_ask(executor: Executor) -> None:
    beams = executor.enqueue_request(prompt_of(5), BeamSearchParams(beam_width=3, max_tokens=6))
    (response,) = executor.await_responses(beams, TIMEOUT)
    assert response.output is not None
    assert len(response.output.outputs) == 3
    late = executor.enqueue_request(
        prompt_of(5), GREEDY, deadline=1e-6, tenant="a", priority=3, cache_salt="x"
    )
    assert reason_of(executor.await_responses(late, TIMEOUT)[0]) == "timeout"
    text = executor.enqueue_request({"prompt": "def main("})
    (response,) = executor.await_responses(text, TIMEOUT)
    assert response.output is not None
    assert response.output.prompt == "def main("


def test_a_step_that_fails_is_the_error_of_its_requests(executor: Executor) -> None:
    with held(executor._thread):
        future = executor._thread.call(lambda engine: break_steps(engine, poison_of(2)))
        good, bad = (executor.enqueue_request(prompt_of(40, seed=i), DELTA) for i in range(2))
    future.result(TIMEOUT)
    responses = executor.await_responses(bad, TIMEOUT)
    while not responses[-1].is_final:
        responses += executor.await_responses(bad, TIMEOUT)
    assert isinstance(responses[-1].error, Broken)
    assert reason_of(responses[-1]) == "error"
    executor._thread.call(lambda engine: None).result(TIMEOUT)
    ((last,),) = executor.await_responses([good], TIMEOUT)
    assert last.is_final


def poison_of(number: int) -> Any:
    """Steps with this request fail."""
    return lambda step: any(request.request_id == str(number) for request, _ in step.rows)


def test_records_are_those_since_the_last_call(executor: Executor) -> None:
    assert executor.get_latest_iteration_stats() == []
    assert executor.get_latest_request_stats() == []
    ids = [executor.enqueue_request(prompt_of(5, seed=i), GREEDY) for i in range(3)]
    executor.await_responses(ids, TIMEOUT)
    executor._thread.call(lambda engine: None).result(TIMEOUT)
    steps = executor.get_latest_iteration_stats()
    assert sum(record.num_generation_tokens for record in steps) == 48
    assert [record.step for record in steps] == sorted({record.step for record in steps})
    ended = executor.get_latest_request_stats()
    assert sorted(int(record.request_id) for record in ended) == ids
    assert {record.finish_reason for record in ended} == {"length"}
    assert executor.get_latest_iteration_stats() == []
    assert executor.get_latest_request_stats() == []


def test_no_more_than_a_thousand_records_are_kept(executor: Executor) -> None:
    latest = executor._latest
    executor.await_responses(executor.enqueue_request(prompt_of(5), GREEDY), TIMEOUT)
    executor._thread.call(lambda engine: None).result(TIMEOUT)
    (record,) = executor.get_latest_request_stats()
    step = executor.get_latest_iteration_stats()[-1]
    for _ in range(2500):
        latest.ended(record)
        latest.stepped(step)
    assert len(executor.get_latest_request_stats()) == len(executor.get_latest_iteration_stats()) == 1000


def test_shutting_down_waits_for_what_is_under_way() -> None:
    executor = Executor(tiny())
    ids = [executor.enqueue_request(prompt_of(9, seed=i), GREEDY) for i in range(12)]
    executor.shutdown()
    executor.shutdown()
    assert not executor.can_enqueue_requests()
    for seed, (response,) in enumerate(executor.await_responses(ids)):
        assert tokens_of(response) == dense_greedy(prompt_of(9, seed=seed), 16)
    for use in (executor.await_responses, lambda: executor.enqueue_request(prompt_of(5))):
        with pytest.raises(EngineDeadError, match="closed"):
            use()
    with pytest.raises(UnknownRequestError):
        executor.await_responses(ids[0])


def test_shutting_down_aborts_after_a_while() -> None:
    executor = Executor(tiny())
    running = executor.enqueue_request(prompt_of(5), LONG)
    first = executor.await_responses(running, TIMEOUT)
    with ThreadPoolExecutor(2) as pool:
        with held(executor._thread):
            waiting = executor.enqueue_request(prompt_of(5), LONG)
            consumer = pool.submit(executor.await_responses, waiting)
            down = pool.submit(executor.shutdown, 0.0)
            wait_until(lambda: executor._thread._commands.qsize() == 3)  # the request, draining, aborting
            with pytest.raises(EngineDrainingError):
                executor.enqueue_request(prompt_of(5))
        down.result(TIMEOUT)
    (last,) = executor.await_responses(running)
    assert reason_of(last) == "abort"
    tokens = tokens_of(*first, last)
    assert tokens == dense_greedy(prompt_of(5), 110)[: len(tokens)]
    (refused,) = consumer.result(TIMEOUT)
    assert isinstance(refused.error, EngineDrainingError)


def test_an_error_in_the_block_aborts_the_rest() -> None:
    executor = Executor(tiny())
    number = executor.enqueue_request(prompt_of(5), LONG)
    with pytest.raises(Broken), executor:
        raise Broken("somewhere else")
    (response,) = executor.await_responses(number)
    assert response.is_final


def test_who_waits_for_any_response_is_told_of_the_end() -> None:
    executor = Executor(tiny())
    with ThreadPoolExecutor(1) as pool:
        consumer = pool.submit(executor.await_responses)
        executor.shutdown()
        with pytest.raises(EngineDeadError):
            consumer.result(TIMEOUT)


def test_an_engine_that_dies_ends_every_request() -> None:
    executor = Executor(tiny())
    with held(executor._thread):
        executor._thread.call(lambda engine: break_steps(engine, lambda step: True))
        ids = [executor.enqueue_request(prompt_of(5, seed=i), GREEDY) for i in range(60)]
    for (response,) in executor.await_responses(ids, TIMEOUT):
        assert response.is_final
        assert isinstance(response.error, Broken | EngineDeadError)
    with pytest.raises(EngineDeadError, match="no step today"):
        executor.await_responses(timeout=TIMEOUT)
    with pytest.raises(EngineDeadError):
        executor.enqueue_request(prompt_of(5))
    executor.shutdown()


def test_it_makes_its_engine(tmp_path: Path) -> None:
    with Executor(tiny_decoder(), **SIZES, max_queue_length=5) as executor:
        assert executor.can_enqueue_requests()
    with pytest.raises(ValueError, match="block_size"):
        Executor(tiny_decoder(), block_size=-1)
    with pytest.raises(ValueError, match=tmp_path.name):
        Executor(tmp_path / "nothing")
    engine = Engine(tiny_decoder(), **SIZES)
    for arguments in ({"max_queue_length": -1}, {"max_unread": 0}, {"block_size": 8}):
        with pytest.raises(InvalidRequestError, match=next(iter(arguments))):
            Executor(engine, **arguments)
    assert engine.stats().num_steps == 0
    engine.close()
    with pytest.raises(EngineClosedError):
        Executor(engine)
