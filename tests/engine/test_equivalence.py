"""Greedy output in float32 is the same alone, batched, chunked, preempted, cached and forked.

And it is that of the plain decoder: a full forward pass without a cache for every token.
"""

import random
from dataclasses import replace

import pytest

from jaxpaged import Engine, SamplingParams
from tests.engine.tiny import GREEDY, dense_greedy, drain, idle, new_engine, prompt_of, tokens_of

LENGTHS = [(40, 30), (3, 40), (17, 25), (33, 12), (5, 33), (24, 24), (1, 20), (12, 40)]  # prompt, output
PROMPTS = [prompt_of(length, seed) for seed, (length, _) in enumerate(LENGTHS)]
PARAMS = [GREEDY.clone(max_tokens=count) for _, count in LENGTHS]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return [dense_greedy(prompt, count) for prompt, (_, count) in zip(PROMPTS, LENGTHS, strict=True)]


def test_the_oracle_depends_on_the_whole_context() -> None:
    """Else the tests below would prove little."""
    prompt = PROMPTS[0]
    changed = [prompt[0] % 300 + 3, *prompt[1:]]
    assert dense_greedy(prompt, 8) != dense_greedy(changed, 8)


def test_alone_and_chunked(engine: Engine, expected: list[list[int]]) -> None:
    for prompt, params, tokens in zip(PROMPTS, PARAMS, expected, strict=True):
        engine.reset_prefix_cache()
        before = engine.stats()
        assert tokens_of(engine.generate(prompt, params)) == [tokens]
        after = engine.stats()
        # The prompt goes in chunks of the token budget; its last one brings the first token.
        assert after.num_steps - before.num_steps == -(-len(prompt) // 16) + len(tokens) - 1
        assert after.num_preemptions == before.num_preemptions


def test_batched(engine: Engine, expected: list[list[int]]) -> None:
    some = [1, 4, 6]
    before = engine.stats()
    outputs = engine.generate([PROMPTS[i] for i in some], [PARAMS[i].clone(max_tokens=20) for i in some])
    assert tokens_of(outputs) == [expected[i][:20] for i in some]
    assert engine.stats().num_preemptions == before.num_preemptions
    assert engine.stats().num_steps - before.num_steps < 25


def test_preempted(engine: Engine, expected: list[list[int]]) -> None:
    before = engine.stats().num_preemptions
    outputs = engine.generate(PROMPTS, PARAMS)
    assert tokens_of(outputs) == expected
    preemptions = [output.metrics.num_preemptions for output in outputs if output.metrics]
    assert engine.stats().num_preemptions - before == sum(preemptions) > 0


@pytest.mark.parametrize("caching", [True, False])
def test_cache_hits(caching: bool, expected: list[list[int]]) -> None:
    with new_engine(enable_prefix_caching=caching) as engine:
        for _ in range(2):
            for i in (0, 2, 5):
                assert tokens_of(engine.generate(PROMPTS[i], PARAMS[i])) == [expected[i]]
        # Each second run finds every full block but never its last token.
        hits = sum((len(PROMPTS[i]) - 1) // 4 * 4 for i in (0, 2, 5))
        assert engine.stats().prefix_cache_hits == (hits if caching else 0)


def test_hits_within_generated_text(engine: Engine, expected: list[list[int]]) -> None:
    engine.generate(PROMPTS[0], PARAMS[0])
    longer = PROMPTS[0] + expected[0][:20]
    (output,) = engine.generate(longer, GREEDY.clone(max_tokens=10))
    assert output.outputs[0].token_ids == expected[0][20:]
    assert output.num_cached_tokens == (len(longer) - 1) // 4 * 4


def test_requests_of_one_step_share_a_prefix(engine: Engine, expected: list[list[int]]) -> None:
    """The second one uses blocks that are written in the very step that reads them."""
    before = engine.stats()
    prompt, tokens = PROMPTS[6] * 9, 6
    wanted = dense_greedy(prompt, tokens)
    for i in range(3):
        engine.add_request(str(i), prompt, GREEDY.clone(max_tokens=tokens))
    engine.step()
    assert engine.stats().prefix_cache_hits - before.prefix_cache_hits == 16
    last = drain(engine)
    assert [last[str(i)].outputs[0].token_ids for i in range(3)] == [wanted] * 3


def test_salts_keep_caches_apart(engine: Engine, expected: list[list[int]]) -> None:
    for salt, cached in (("a", 0), ("b", 0), ("a", 36), (None, 0)):
        prompt = {"prompt_token_ids": PROMPTS[0], **({} if salt is None else {"cache_salt": salt})}
        (output,) = engine.generate(prompt, PARAMS[0])
        assert output.outputs[0].token_ids == expected[0]
        assert output.num_cached_tokens == cached


@pytest.mark.parametrize(("which", "n"), [(5, 2), (3, 4), (1, 8), (0, 3)])
def test_forked(engine: Engine, expected: list[list[int]], which: int, n: int) -> None:
    """n completions share the prompt's blocks; each copies the one it writes to."""
    before = engine.stats()
    engine.add_request("fork", PROMPTS[which], PARAMS[which].clone(n=n))
    last = drain(engine)["fork"]
    assert [c.token_ids for c in last.outputs] == [expected[which]] * n
    assert [c.index for c in last.outputs] == list(range(n))
    after = engine.stats()
    # Nothing is copied where the prompt's last token, which all compute again, begins a block.
    assert (after.blocks_copied > before.blocks_copied) == ((len(PROMPTS[which]) - 1) % 4 > 0)
    if (which, n) == (1, 8):  # eight times 43 tokens do not fit
        assert after.num_preemptions > before.num_preemptions


def test_forks_of_many_requests_preempted(engine: Engine, expected: list[list[int]]) -> None:
    before = engine.stats().num_preemptions
    outputs = engine.generate(PROMPTS, [params.clone(n=1 + i % 3) for i, params in enumerate(PARAMS)])
    for output, tokens in zip(outputs, expected, strict=True):
        assert all(completion.token_ids == tokens for completion in output.outputs)
    assert engine.stats().num_preemptions > before


@pytest.mark.parametrize("seed", range(4))
def test_any_mix_of_requests_and_aborts(engine: Engine, expected: list[list[int]], seed: int) -> None:
    rng = random.Random(seed)
    wanted: dict[str, list[int]] = {}
    got: dict[str, list[list[int]]] = {}
    pending = [(f"{i}.{k}", i) for k in range(3) for i in range(len(PROMPTS))]
    rng.shuffle(pending)
    while pending or engine.has_unfinished_requests:
        if pending and rng.random() < 0.3:
            name, i = pending.pop()
            count = rng.randint(1, LENGTHS[i][1])
            engine.add_request(name, PROMPTS[i], GREEDY.clone(max_tokens=count, n=rng.choice([1, 1, 2, 3])))
            wanted[name] = expected[i][:count]
        live = list(engine.block_tables())
        if live and rng.random() < 0.03:
            name = rng.choice(live)
            engine.abort_request(name)
            del wanted[name]
        for output in engine.step():
            if output.finished:
                got[output.request_id] = [completion.token_ids for completion in output.outputs]
        engine.check_invariants()
    assert len(got) == 24
    assert {name: got[name] for name in wanted} == {
        name: [tokens] * len(got[name]) for name, tokens in wanted.items()
    }


@pytest.mark.parametrize(("block_size", "num_blocks"), [(1, 81), (7, 13)])
def test_blocks_of_another_size(expected: list[list[int]], block_size: int, num_blocks: int) -> None:
    """One token a block, and blocks that are no power of two, with a budget of two tokens."""
    sizes = {
        "max_num_seqs": 2,
        "max_num_batched_tokens": 2,
        "num_blocks": num_blocks,
        "num_scheduler_steps": 1,
    }
    with new_engine(block_size=block_size, **sizes) as engine, idle(engine):
        outputs = engine.generate(PROMPTS, [replace(params, n=2) for params in PARAMS])
        assert [c.token_ids for o in outputs for c in o.outputs] == [t for t in expected for _ in range(2)]
        assert engine.stats().num_preemptions > 0


def test_stopping_at_the_models_length(engine: Engine) -> None:
    prompt = prompt_of(100)
    (output,) = engine.generate(prompt, SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True))
    assert output.outputs[0].token_ids == dense_greedy(prompt, 28)
    assert output.outputs[0].finish_reason == "length"
