"""The ways in and out of an engine: prompts, parameters, weights, tokenizers, kinds of output, figures."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpaged import Engine, EngineStats, RequestOutput, RequestOutputKind, SamplingParams
from jaxpaged.models import save_model
from tests.engine.tiny import (
    CONFIG,
    EOS,
    GREEDY,
    SIZES,
    dense_greedy,
    drain,
    is_dense_greedy,
    new_engine,
    prompt_of,
    tiny_decoder,
    tokens_of,
)
from tests.text.tokenizers_made_here import byte_level

IDS = prompt_of(9)
TEXT = "the cat sat"


KINDS: dict[str, Callable[[], Any]] = {
    "list": lambda: IDS,
    "tuple": lambda: tuple(IDS),
    "numpy": lambda: np.array(IDS),
    "numpy of 16 bits": lambda: np.array(IDS, np.uint16),
    "list of numpy integers": lambda: list(np.array(IDS)),
    "jax": lambda: jnp.array(IDS),
    "mapping": lambda: {"prompt_token_ids": IDS},
    "mapping of numpy": lambda: {"prompt_token_ids": np.array(IDS)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_prompt_of_token_ids(engine: Engine, kind: str) -> None:
    prompt = KINDS[kind]()
    wanted = dense_greedy(IDS, 16)
    for given in (prompt, [prompt]):
        (output,) = engine.generate(given, GREEDY)
        assert output.prompt_token_ids == IDS
        assert all(type(token) is int for token in output.prompt_token_ids)
        assert output.prompt is None
        assert output.outputs[0].token_ids == wanted
    engine.add_request("x", prompt, GREEDY)
    assert drain(engine)["x"].outputs[0].token_ids == wanted
    assert [token for o in engine.stream(prompt, GREEDY) for token in o.outputs[0].token_ids] == wanted


def test_prompts_of_text(engine: Engine) -> None:
    ids = byte_level().encode(TEXT)
    assert ids[0] == 0  # the beginning of a sequence, as the tokenizer says
    wanted = dense_greedy(ids, 16)
    for prompt in (TEXT, [TEXT], {"prompt": TEXT}, [{"prompt": TEXT}]):
        (output,) = engine.generate(prompt, GREEDY)
        assert (output.prompt, output.prompt_token_ids) == (TEXT, ids)
        assert output.outputs[0].token_ids == wanted
        assert output.outputs[0].text == byte_level().decode(wanted)


def test_many_prompts_keep_their_order(engine: Engine) -> None:
    prompts: list[Any] = [prompt_of(20), TEXT, {"prompt_token_ids": prompt_of(3)}, np.array(prompt_of(1))]
    params = [GREEDY.clone(max_tokens=count) for count in (3, 12, 1, 7)]
    ids = [prompt_of(20), byte_level().encode(TEXT), prompt_of(3), prompt_of(1)]
    wanted = [dense_greedy(prompt, count) for prompt, count in zip(ids, (3, 12, 1, 7), strict=True)]
    assert tokens_of(engine.generate(prompts, params)) == wanted
    assert tokens_of(engine.generate(iter(prompts), tuple(params))) == wanted
    assert tokens_of(engine.generate(np.array([prompt_of(4), prompt_of(4, 1)]), GREEDY)) == [
        dense_greedy(prompt_of(4), 16),
        dense_greedy(prompt_of(4, 1), 16),
    ]
    assert engine.generate([]) == []
    assert [len(output.outputs[0].token_ids) <= 16 for output in engine.generate(prompts)] == [True] * 4


def test_a_progress_bar_when_asked_for(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.generate([IDS] * 3, GREEDY)
    assert capsys.readouterr() == ("", "")
    engine.generate([IDS] * 3, GREEDY, use_tqdm=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "3/3" in err


def outputs_of(engine: Engine, kind: RequestOutputKind, **changes: Any) -> list[RequestOutput]:
    params = GREEDY.clone(output_kind=kind, max_tokens=20, logprobs=1, **changes)
    engine.add_request("x", IDS, params)
    outputs = []
    while engine.has_unfinished_requests:
        outputs += engine.step()
    return outputs


def completions(outputs: Sequence[RequestOutput], index: int) -> list[Any]:
    return [c for output in outputs for c in output.outputs if c.index == index]


@pytest.mark.parametrize("n", [1, 2])
def test_kinds_of_output(engine: Engine, n: int) -> None:
    wanted = dense_greedy(IDS, 20)
    (final,) = outputs_of(engine, RequestOutputKind.FINAL_ONLY, n=n)
    cumulative = outputs_of(engine, RequestOutputKind.CUMULATIVE, n=n)
    delta = outputs_of(engine, RequestOutputKind.DELTA, n=n)
    assert final.finished
    for outputs in (cumulative, delta):
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert cumulative[-1].outputs == final.outputs
    for index in range(n):
        whole = final.outputs[index]
        assert whole.token_ids == wanted
        parts = completions(delta, index)
        assert [token for part in parts for token in part.token_ids] == wanted
        assert "".join(part.text for part in parts) == whole.text == byte_level().decode(wanted)
        assert [each for part in parts for each in part.logprobs] == whole.logprobs
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
        for earlier, later in zip(
            completions(cumulative, index), completions(cumulative, index)[1:], strict=False
        ):
            assert later.text.startswith(earlier.text)
            assert later.token_ids[: len(earlier.token_ids)] == earlier.token_ids


def test_without_text(engine: Engine) -> None:
    (output,) = engine.generate(TEXT, GREEDY.clone(detokenize=False))
    assert output.outputs[0].text == ""
    assert output.outputs[0].token_ids == dense_greedy(byte_level().encode(TEXT), 16)


def test_metrics_of_a_request(engine: Engine) -> None:
    for output in engine.generate([prompt_of(40), prompt_of(3)], GREEDY):
        metrics = output.metrics
        assert metrics is not None
        assert metrics.first_scheduled_time is not None
        assert metrics.first_token_time is not None
        assert metrics.last_token_time is not None
        times = (metrics.first_scheduled_time, metrics.first_token_time, metrics.last_token_time)
        assert metrics.arrival_time <= times[0] <= times[1] <= times[2]
        assert metrics.num_preemptions == 0


GROWING = """
    num_steps num_tokens num_padded_tokens num_prompt_tokens num_generation_tokens schedule_time build_time
    device_time update_time num_preemptions num_compiles compile_time prefix_cache_queries prefix_cache_hits
    blocks_allocated blocks_reused blocks_evicted blocks_copied
"""


def test_statistics(engine: Engine) -> None:
    seen: list[EngineStats] = [engine.stats()]
    assert seen[0].kv_cache_usage_perc == 0
    params = GREEDY.clone(max_tokens=30)
    for i in range(10):
        engine.add_request(str(i), prompt_of(20, seed=i), params)
    while engine.has_unfinished_requests:
        engine.step()
        seen.append(stats := engine.stats())
        tables = [tables[0] for tables in engine.block_tables().values()]
        assert stats.num_requests_running + stats.num_requests_waiting == len(tables)
        assert stats.num_blocks - stats.num_free_blocks == len({block for table in tables for block in table})
        assert stats.kv_cache_usage_perc == pytest.approx(1 - stats.num_free_blocks / stats.num_blocks)
    for name in GROWING.split():
        values = [getattr(stats, name) for stats in seen]
        assert values == sorted(values), name
    first, last = seen[0], seen[-1]
    assert last.num_prompt_tokens - first.num_prompt_tokens == 200
    assert last.num_generation_tokens - first.num_generation_tokens == 300
    assert last.finished["length"] - first.finished.get("length", 0) == 10
    assert last.num_preemptions > first.num_preemptions
    computed = last.num_tokens - first.num_tokens
    assert computed >= 10 * 49 - (last.prefix_cache_hits - first.prefix_cache_hits)
    assert 0 < last.padding_waste < 1
    assert last.host_time_per_step > 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_model(tiny_decoder(), folder, dtype=jnp.float32)
    return folder


def test_checkpoints_with_and_without_a_tokenizer(checkpoint: Path) -> None:
    wanted = [dense_greedy(IDS, 16)]
    sizes: dict[str, Any] = {**SIZES, "dtype": "float32"}
    with Engine.from_pretrained(checkpoint, **sizes) as engine:
        (output,) = engine.generate(IDS, GREEDY)
        assert [output.outputs[0].token_ids] == wanted
        assert output.outputs[0].text == ""
    byte_level()._backend.save(os.fspath(checkpoint / "tokenizer.json"))
    with Engine(os.fspath(checkpoint), **sizes) as engine:
        (output,) = engine.generate(IDS, GREEDY)
        assert [output.outputs[0].token_ids] == wanted
        assert output.outputs[0].text == byte_level().decode(wanted[0])
    (checkpoint / "tokenizer.json").unlink()
    with Engine(checkpoint, tokenizer=byte_level(), **sizes) as engine:
        assert tokens_of(engine.generate(TEXT, GREEDY)) == [dense_greedy(byte_level().encode(TEXT), 16)]


@pytest.fixture
def changed() -> Any:
    """Weights like those that a trainer would hold after some steps."""
    return jax.tree.map(lambda x: x * 1.1 + 0.01, nnx.state(tiny_decoder()))


def test_a_decoder_with_the_weights_of_a_trainer(changed: Any) -> None:
    trained = nnx.merge(nnx.graphdef(tiny_decoder()), changed)
    abstract = nnx.eval_shape(lambda: tiny_decoder.__wrapped__(CONFIG))
    for model, params in (
        (tiny_decoder(), changed),
        (tiny_decoder(), nnx.to_pure_dict(changed)),
        (tiny_decoder(), jax.tree.map(np.asarray, changed)),
        (abstract, changed),
        (trained, None),
    ):
        with Engine(model, params, **SIZES) as engine:
            (tokens,) = tokens_of(engine.generate(IDS, GREEDY))
        assert is_dense_greedy(IDS, tokens, trained)
        assert tokens != dense_greedy(IDS, 16)


def test_weights_are_neither_copied_nor_freed(changed: Any) -> None:
    before = len(jax.live_arrays())
    engine = Engine(tiny_decoder(), changed, **SIZES)
    state = jax.tree.leaves(engine._core.runner.state)  # type: ignore[union-attr]
    assert len(jax.live_arrays()) - before == len(state)
    engine.close()
    assert not any(array.is_deleted() for array in jax.tree.leaves(changed))


def test_several_end_tokens(engine: Engine) -> None:
    first = dense_greedy(IDS, 16)
    end = first[4]
    with Engine(tiny_decoder(replace(CONFIG, eos_token_ids=(EOS, end))), **SIZES) as ending:
        (output,) = ending.generate(IDS, GREEDY.clone(ignore_eos=False))
        assert output.outputs[0].token_ids == first[: first.index(end) + 1]
        assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)
        assert tokens_of(ending.generate(IDS, GREEDY)) == [first]


def test_the_seed_of_an_engine_fixes_what_it_draws() -> None:
    def drawn(seed: int) -> list[list[int]]:
        with new_engine(seed=seed) as engine:
            return tokens_of(engine.generate([IDS] * 3, SamplingParams(max_tokens=10)))

    assert drawn(1) == drawn(1) != drawn(2)
