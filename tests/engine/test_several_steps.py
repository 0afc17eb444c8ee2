"""Several decode steps in one program give what single steps give, whenever a request ends."""

from collections.abc import Iterator

import pytest

from jaxpaged import Engine, SamplingParams
from tests.engine.tiny import GREEDY, dense_greedy, drain, idle, new_engine, prompt_of

STEPS = 8


@pytest.fixture(scope="module")
def single_steps() -> Iterator[Engine]:
    with new_engine(num_scheduler_steps=1) as engine:
        yield engine


def test_a_stretch_of_decoding_runs_in_few_programs(engine: Engine) -> None:
    engine.add_request("x", prompt_of(5), GREEDY.clone(max_tokens=1 + 2 * STEPS))
    parts = []
    before = engine.stats().num_steps
    while engine.has_unfinished_requests:
        parts += [len(output.outputs[0].token_ids) for output in engine.step()]
        engine.check_invariants()
    assert parts == [1, 1 + STEPS, 1 + 2 * STEPS]
    assert engine.stats().num_steps - before == 1 + 2 * STEPS


@pytest.mark.parametrize("end", range(2, 2 + STEPS))
def test_a_request_ends_in_the_middle(engine: Engine, end: int) -> None:
    """By a token id; the rows beside it go on, and what it computed too much is seen by nobody."""
    prompts = [prompt_of(5), prompt_of(7)]
    wanted = [dense_greedy(prompt, 30) for prompt in prompts]
    end = wanted[0].index(wanted[0][end]) + 1
    stopping = GREEDY.clone(stop_token_ids=[wanted[0][end - 1]], max_tokens=30)
    for _ in range(2):  # the second time with what the first left in the prefix cache
        engine.add_request("stops", prompts[0], stopping)
        engine.add_request("goes on", prompts[1], GREEDY.clone(max_tokens=30))
        outputs = drain(engine)
        assert outputs["stops"].outputs[0].token_ids == wanted[0][:end]
        assert outputs["stops"].outputs[0].finish_reason == "stop"
        assert outputs["goes on"].outputs[0].token_ids == wanted[1]
    (again,) = engine.generate(prompts[0] + wanted[0], GREEDY.clone(max_tokens=5))
    assert again.outputs[0].token_ids == dense_greedy(prompts[0] + wanted[0], 5)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, seed=3),
        SamplingParams(temperature=0.8, seed=4, top_k=20, top_p=0.9),
        GREEDY.clone(repetition_penalty=1.5, presence_penalty=0.5),
        GREEDY.clone(min_tokens=9, logit_bias={1: 5.0}, ignore_eos=False),
        GREEDY.clone(stop=["th", "on"]),
        GREEDY.clone(logprobs=2, prompt_logprobs=1),
    ],
    ids=["sampled", "filtered", "penalised", "biased", "stop string", "logprobs"],
)
def test_with_every_kind_of_sampling(engine: Engine, single_steps: Engine, params: SamplingParams) -> None:
    params = params.clone(max_tokens=50, n=2)
    prompts = [prompt_of(4, seed=1), prompt_of(10, seed=2)]
    with idle(single_steps):
        for some in (prompts[:1], prompts):
            found, wanted = engine.generate(some, params), single_steps.generate(some, params)
            assert [output.outputs for output in found] == [output.outputs for output in wanted]
            assert [output.prompt_logprobs for output in found] == [o.prompt_logprobs for o in wanted]


def test_room_is_not_taken_from_others(engine: Engine, single_steps: Engine) -> None:
    """Where the pool is nearly full, decoding ahead preempts nobody more than single steps do."""
    prompts = [prompt_of(20, seed=i) for i in range(4)]
    for each in (engine, single_steps):
        before = each.stats().num_preemptions
        outputs = each.generate(prompts, GREEDY.clone(max_tokens=19))  # 38 of 39 blocks hold 4 x 38 tokens
        assert [o.outputs[0].token_ids for o in outputs] == [dense_greedy(p, 19) for p in prompts]
        assert each.stats().num_preemptions == before
