"""Layers with and without sliding windows in one model: block tables of their own, memory that stays bounded."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from jaxpaged import AttentionVariant, Engine
from jaxpaged.block_space import BlockStats
from jaxpaged.config import EngineConfig
from jaxpaged.models import ModelConfig, load_config, save_model
from tests.engine.family import FULL, PARAMS, PROMPTS, core_of, sibling, unburdened
from tests.engine.tiny import CONFIG, GREEDY, drain, is_dense_greedy, new_engine, prompt_of, tiny_decoder

# One bucket, so two programs at most; a step is no multiple of a block.
SIZES: dict[str, Any] = {"max_num_seqs": 6, "max_num_batched_tokens": 6, "max_model_len": 128}
SWAP = {"async_scheduling": True, "num_host_blocks": 60, "preemption_mode": "swap"}


@pytest.fixture(autouse=True, scope="module")
def _one_bucket() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineConfig, "buckets", property(lambda self: (self.max_num_batched_tokens,)))
        yield


def with_windows(*windows: int | None) -> ModelConfig:
    return replace(CONFIG, num_layers=len(windows), sliding_windows=windows)


ALTERNATING = with_windows(None, 9, None, 9)
# (model, attention, blocks of the pool: some of the requests fit, all do not)
MODELS: dict[str, tuple[ModelConfig, str, int]] = {
    "alternating, numba": (ALTERNATING, "numba", 60),
    "one of each, xla": (with_windows(None, 9), "xla", 60),
    "one of each, reference": (with_windows(None, 9), "reference", 60),
    "two groups with one window": (with_windows(9, None, 9), "numba", 70),
    "three kinds": (with_windows(7, None, 5), "numba", 60),
    "nothing but windows": (with_windows(9, 9), "numba", 20),
}


def groups_of(engine: Engine) -> tuple[int | None, ...]:
    return core_of(engine).scheduler.space.windows


def moved(engine: Engine) -> BlockStats:
    return core_of(engine).scheduler.space.stats


def check_tokens(engine: Engine, config: ModelConfig, n: int) -> None:
    model = tiny_decoder(config)
    outputs = engine.generate(PROMPTS, [params.clone(n=n) for params in PARAMS])
    for output, params in zip(outputs, PARAMS, strict=True):
        first = output.outputs[0].token_ids
        assert [completion.token_ids for completion in output.outputs] == [first] * n
        assert len(first) == params.max_tokens
        assert is_dense_greedy(output.prompt_token_ids, first, model)
    engine.check_invariants()


@pytest.mark.parametrize("name", MODELS)
def test_paged_equals_dense(name: str) -> None:
    """Batched, chunked, preempted, forked and from the cache; computed again, and swapped while running ahead."""
    config, attention, num_blocks = MODELS[name]
    for switches in ({"num_scheduler_steps": 1}, SWAP | {"num_scheduler_steps": 1}):
        with sibling(
            config, attention=attention, num_blocks=num_blocks, **SIZES, **FULL, **switches
        ) as engine:
            for n in (1, 3):
                check_tokens(engine, config, n)
            assert engine.stats().num_preemptions > 0
            assert moved(engine).trimmed > 0
            for cached in (None, (len(PROMPTS[0]) - 1) // 4 * 4):
                (output,) = engine.generate(PROMPTS[0], PARAMS[0])
                assert is_dense_greedy(PROMPTS[0], output.outputs[0].token_ids, tiny_decoder(config))
                assert cached in (None, output.num_cached_tokens)
            if "preemption_mode" in switches:
                assert moved(engine).swapped_in > 0


def test_the_layouts_are_those_that_are_meant() -> None:
    wanted = {
        "alternating, numba": (None, 9),
        "two groups with one window": (9, None, 9),
        "three kinds": (7, None, 5),
        "nothing but windows": (9,),
    }
    for name, groups in wanted.items():
        config, attention, num_blocks = MODELS[name]
        with new_engine(config, attention=attention, num_blocks=num_blocks, **SIZES) as engine:
            assert sorted(map(str, groups_of(engine))) == sorted(map(str, groups)), name


@pytest.mark.parametrize("ahead", [False, True])
def test_several_steps_in_one_program(ahead: bool) -> None:
    """A window moves on while a program runs; its blocks are given back after it."""
    arguments = {**SIZES, **FULL, "attention": "numba", "num_blocks": 60, "num_scheduler_steps": 8}
    with sibling(ALTERNATING, async_scheduling=ahead, **arguments) as engine:
        for _ in range(2):
            check_tokens(engine, ALTERNATING, 1)
        steps = engine.stats().num_steps
        calls = 0
        engine.add_request("x", prompt_of(5), GREEDY.clone(max_tokens=65))
        while engine.has_unfinished_requests:
            engine.step()
            calls += 1
        assert engine.stats().num_steps - steps == 65
        assert calls < 20


# Memory.


def live_blocks(engine: Engine) -> list[int]:
    """The most blocks that any request holds, for each group of layers."""
    requests = list(core_of(engine).scheduler.running)
    return [
        max((sum(block > 0 for block in request.tables[group]) for request in requests), default=0)
        for group in range(len(groups_of(engine)))
    ]


@pytest.mark.parametrize("ahead", [False, True])
def test_what_lies_behind_a_window_is_given_back(ahead: bool) -> None:
    """A long prompt in chunks, then decoding: a group with a window of 9 never needs more than five blocks of four."""
    arguments = {**SIZES, "attention": "numba", "num_blocks": 60, "num_scheduler_steps": 1}
    with sibling(ALTERNATING, async_scheduling=ahead, **arguments) as engine:
        full, window = (groups_of(engine).index(w) for w in (None, 9))
        engine.add_request("x", prompt_of(90), GREEDY.clone(max_tokens=38))
        most = [0, 0]
        while engine.has_unfinished_requests:
            for output in engine.step():
                last = output
            engine.check_invariants()
            most = [max(pair) for pair in zip(most, live_blocks(engine), strict=True)]
        assert is_dense_greedy(prompt_of(90), last.outputs[0].token_ids, tiny_decoder(ALTERNATING))
        assert most[full] == 32  # 127 tokens
        assert most[window] <= (9 + 6 - 2) // 4 + 2


@pytest.mark.parametrize("ahead", [False, True])
def test_a_sequence_longer_than_the_pool(ahead: bool) -> None:
    """Five blocks hold what a window of 9 reaches, however long the sequence is: 128 tokens are 32 blocks."""
    config, attention, _ = MODELS["nothing but windows"]
    arguments = {**SIZES, "attention": attention, "num_blocks": 6, "num_scheduler_steps": 1}
    with sibling(config, async_scheduling=ahead, **arguments) as engine:
        for prompt in (prompt_of(100), prompt_of(7)):
            (output,) = engine.generate(prompt, GREEDY.clone(max_tokens=128 - len(prompt)))
            assert len(output.outputs[0].token_ids) == 128 - len(prompt)
            assert is_dense_greedy(prompt, output.outputs[0].token_ids, tiny_decoder(config))
        outputs = engine.generate([prompt_of(60), prompt_of(61)], GREEDY.clone(max_tokens=50, n=2))
        for output in outputs:
            for completion in output.outputs:
                assert is_dense_greedy(output.prompt_token_ids, completion.token_ids, tiny_decoder(config))


def test_a_window_of_the_variant_counts_as_one() -> None:
    variant = AttentionVariant(sliding_window=9)
    arguments = {**SIZES, "attention": "numba", "num_blocks": 6, "num_scheduler_steps": 1}
    with new_engine(variant=variant, **arguments) as engine, unburdened(engine):
        assert groups_of(engine) == (9,)
        (output,) = engine.generate(prompt_of(60), GREEDY.clone(max_tokens=60))
        model = tiny_decoder(with_windows(9, 9))  # the same weights
        assert is_dense_greedy(prompt_of(60), output.outputs[0].token_ids, model)


# Prefixes.


def test_a_hit_takes_from_each_group_what_it_needs() -> None:
    arguments = {**SIZES, "attention": "numba", "num_blocks": 60, "num_scheduler_steps": 1}
    with sibling(ALTERNATING, **arguments) as engine:
        full, window = (groups_of(engine).index(w) for w in (None, 9))
        prompt = prompt_of(90)
        (first,) = engine.generate(prompt, GREEDY)
        tokens, reused = engine.stats().num_tokens, engine.stats().blocks_reused
        engine.add_request("again", prompt, GREEDY)
        engine.step()
        (request,) = core_of(engine).scheduler.running
        assert [sum(block == 0 for block in table) for table in request.tables][full] == 0
        assert sum(block == 0 for block in request.tables[window]) >= 80 // 4
        again = drain(engine)["again"]
        assert again.num_cached_tokens == 88
        assert again.outputs[0].token_ids == first.outputs[0].token_ids
        assert engine.stats().num_tokens - tokens == 2 + 16 - 1
        assert engine.stats().blocks_reused - reused == 22 + 2  # position 88 looks back to 80


@pytest.mark.parametrize("ahead", [False, True])
def test_prefixes_of_any_length_after_any_eviction(ahead: bool) -> None:
    """Blocks behind a window are given back first, so a shorter prefix may be gone where a longer one is there."""
    model, rng = tiny_decoder(ALTERNATING), random.Random(1)
    arguments = {**SIZES, **FULL, "attention": "numba", "num_blocks": 60, "num_scheduler_steps": 1}
    host = {"num_host_blocks": 30} if ahead else {}
    stems = [prompt_of(70, seed=i) for i in range(3)]
    cached = set()
    with sibling(ALTERNATING, async_scheduling=ahead, **arguments, **host) as engine:
        for _ in range(30):
            prompt = [
                *rng.choice(stems)[: rng.randint(5, 70)],
                *prompt_of(rng.randint(1, 3), rng.randint(0, 9)),
            ]
            (output,) = engine.generate(prompt, GREEDY.clone(max_tokens=6))
            assert is_dense_greedy(prompt, output.outputs[0].token_ids, model)
            engine.check_invariants()
            cached.add(output.num_cached_tokens)
        assert engine.stats().blocks_evicted > 0
        assert len(cached) > 5


@pytest.mark.parametrize("ahead", [False, True])
def test_forks_before_and_behind_a_window(ahead: bool) -> None:
    """Where the parent's window has moved on nothing can be shared but what is still cached; the tokens are right."""
    model = tiny_decoder(ALTERNATING)
    arguments = {**SIZES, **FULL, "attention": "numba", "num_blocks": 60, "num_scheduler_steps": 1}
    with sibling(ALTERNATING, async_scheduling=ahead, **arguments) as engine:
        engine.add_request("parent", prompt_of(50), GREEDY.clone(max_tokens=40))
        while not any(output.request_id == "parent" for output in engine.step()):
            pass
        for at in (3, 20, 45, 50, None):
            engine.fork("parent", str(at), at=at, append_token_ids=[7], params=GREEDY)
            engine.check_invariants()
        for output in drain(engine).values():
            assert is_dense_greedy(output.prompt_token_ids, output.outputs[0].token_ids, model)
            if output.request_id in ("45", "50", "None"):
                assert output.num_cached_tokens >= 44


def test_a_checkpoint_with_windows_in_its_last_layers(tmp_path: Path) -> None:
    """Qwen 2: full attention up to ``max_window_layers``."""
    config = replace(
        CONFIG,
        architecture="Qwen2ForCausalLM",
        attention_bias=True,
        num_layers=4,
        sliding_windows=(None, None, 6, 6),
    )
    save_model(tiny_decoder(config), tmp_path, dtype=jnp.float32)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    del fields["layer_types"]
    path.write_text(json.dumps(fields | {"max_window_layers": 2, "sliding_window": 6}))
    assert load_config(tmp_path).sliding_windows == config.sliding_windows
    sizes = {"block_size": 4, "num_blocks": 60, "num_scheduler_steps": 1, **SIZES}
    with Engine(tmp_path, dtype="float32", **sizes, **FULL) as engine, unburdened(engine):
        assert sorted(map(str, groups_of(engine))) == ["6", "None"]
        for n in (1, 2):
            check_tokens(engine, config, n)
        assert engine.stats().num_preemptions > 0
