"""The benchmark workloads give what the plain decoder gives: scaled down on the tiny model, and as they are."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import workloads
from jaxpaged import Engine
from jaxpaged.config import EngineConfig
from jaxpaged.models import Decoder, load_model
from tests.engine.tiny import (
    GREEDY,
    VOCAB_SIZE,
    dense_logprobs,
    drain,
    idle,
    is_dense_greedy,
    prompt_of,
    tokens_of,
)

Requests = list[tuple[list[int], int]]  # prompts and numbers of output tokens
NAMES = ("W1", "W2", "W3")


def real(name: str) -> Requests:
    return [(list(request.prompt), request.out) for request in workloads.make_workloads(0)[name]]


def scaled(name: str) -> Requests:
    """The same mix at an eighth of the lengths, W3's own tokens aside, with token ids of the tiny model."""
    shrunk = []
    for prompt, out in real(name):
        kept = prompt[:64] + prompt[512:520] if name == "W3" else prompt[: max(1, len(prompt) // 8)]
        shrunk.append(([3 + token % (VOCAB_SIZE - 3) for token in kept], out // 8))
    return shrunk


def run(engine: Engine, requests: Requests, n: int = 1) -> list[list[int]]:
    """All at once; the tokens of every completion."""
    params = [GREEDY.clone(max_tokens=out, n=n) for _, out in requests]
    outputs = engine.generate([prompt for prompt, _ in requests], params)
    return [completion.token_ids for output in outputs for completion in output.outputs]


@pytest.mark.parametrize("name", NAMES)
def test_scaled_down(engine: Engine, name: str) -> None:
    requests = scaled(name)
    before = engine.stats()
    batched = run(engine, requests)
    for (prompt, out), tokens in zip(requests, batched, strict=True):
        assert len(tokens) == out
        assert is_dense_greedy(prompt, tokens)
    after = engine.stats()
    if name != "W2":
        assert after.num_preemptions > before.num_preemptions
    cached = run(engine, requests)
    assert cached == batched
    assert engine.stats().prefix_cache_hits > after.prefix_cache_hits
    assert run(engine, requests, n=2) == [tokens for tokens in batched for _ in range(2)]
    assert engine.stats().blocks_copied > after.blocks_copied
    for (prompt, out), tokens in zip(requests, batched, strict=True):
        engine.reset_prefix_cache()
        assert tokens_of(engine.generate(prompt, GREEDY.clone(max_tokens=out))) == [tokens]


def test_arriving_one_after_the_other(engine: Engine) -> None:
    requests = scaled("W1")
    tokens: dict[str, list[int]] = {}
    for i, (prompt, out) in enumerate(requests):
        engine.add_request(str(i), prompt, GREEDY.clone(max_tokens=out))
        tokens |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
    tokens |= {name: output.outputs[0].token_ids for name, output in drain(engine).items()}
    for i, (prompt, out) in enumerate(requests):
        assert len(tokens[str(i)]) == out
        assert is_dense_greedy(prompt, tokens[str(i)])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workloads.make_checkpoint("small", tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def small_model(small: Path) -> Decoder:
    return load_model(small, dtype="float32")


@pytest.fixture(scope="module")
def small_engine(small: Path) -> Iterator[Engine]:
    """Few programs, because each costs seconds; a pool that holds about half of W1."""
    sizes: dict[str, Any] = {"max_num_seqs": 64, "max_num_batched_tokens": 256, "num_blocks": 800}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineConfig, "buckets", property(lambda self: (1, 64, 256)))
        with Engine(small, dtype="float32", max_model_len=1024, **sizes) as engine:
            yield engine


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_as_they_are(small_engine: Engine, small_model: Decoder, name: str) -> None:
    """Batched, chunked and preempted against the dense forward; then alone, cached and forked against that."""
    with idle(small_engine) as engine:
        requests = real(name)
        before = engine.stats()
        batched = run(engine, requests)
        for (prompt, out), tokens in zip(requests, batched, strict=True):
            assert len(tokens) == out
            assert is_dense_greedy(prompt, tokens, small_model)
        after = engine.stats()
        assert (after.num_preemptions > before.num_preemptions) == (name == "W1")
        assert (after.prefix_cache_hits > before.prefix_cache_hits) == (
            name != "W2"
        )  # preempted ones find theirs
        some = sorted(range(len(requests)), key=lambda i: len(requests[i][0]) + requests[i][1])[::16]
        engine.reset_prefix_cache()
        assert [run(engine, [requests[i]])[0] for i in some] == [batched[i] for i in some]
        few = [requests[i] for i in some]
        hits = engine.stats().prefix_cache_hits
        assert run(engine, few) == [batched[i] for i in some]
        assert engine.stats().prefix_cache_hits > hits
        copied = engine.stats().blocks_copied
        assert run(engine, few, n=3) == [batched[i] for i in some for _ in range(3)]
        assert engine.stats().blocks_copied > copied


def test_the_workloads_are_lively(small_model: Decoder) -> None:
    """A model that repeats itself would hide mistakes: the next token must depend on what is far away."""
    tokens = prompt_of(100)
    changed = [tokens[0] + 1, *tokens[1:]]
    assert (
        np.abs(dense_logprobs(tokens, small_model)[-1] - dense_logprobs(changed, small_model)[-1]).max()
        > 0.01
    )
