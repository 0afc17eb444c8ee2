"""Engines whose layers keep keys and values in fewer bits, each in its own format.

A token's codes depend on that token alone, so nothing that holds of a plain pool stops to hold: tokens do not change
with the company, the chunks, a preemption or a hit in the prefix cache. Codes are rounded, though: a key that differs
in its last bit may get another code. With ``deterministic=True`` all bits are compared; without it tokens are.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from jaxpaged import BeamSearchParams, Engine, RequestOutput
from jaxpaged.assembly import _new_state, kv_layout
from jaxpaged.config import EngineConfig
from jaxpaged.errors import InvalidRequestError
from jaxpaged.kv_cache_dtype import ALIASES, PLAIN, QUANTISED, named
from jaxpaged.memory import bytes_per_block, num_blocks_for, tree_bytes
from jaxpaged.models import ModelConfig, split_parameters
from jaxpaged.pallas_kernels import AttentionVariant, MixedKVPool, causal_attention
from jaxpaged.pallas_kernels.quantisation import FORMATS, dequantise, quantise
from jaxpaged.serve.info import gather
from jaxpaged.serve.metrics.engine_metrics import config_families
from jaxpaged.serve.metrics.exposition import FamilyMaker
from jaxpaged.serve.options import EngineOptions
from jaxpaged.step_plan import Move, MoveKind
from tests.engine.family import FULL, PARAMS, PROMPTS, core_of, sibling, unburdened
from tests.engine.test_pool_size import Gpu
from tests.engine.tiny import CONFIG, GREEDY, new_engine, prompt_of, tiny_decoder, tokens_of

KINDS: tuple[Any, ...] = ("fp8_e4m3", "int8", "int4", ("int4", "float32"))
NAMES = [named(kind) for kind in KINDS]
TWO_FORMATS = ("int8", "fp8_e4m3")
HYBRID = replace(CONFIG, num_layers=4, sliding_windows=(9, 9, None, None))
# One program of 16 tokens.
SIZES: dict[str, Any] = {"num_scheduler_steps": 1, "num_host_blocks": 200, "preemption_mode": "swap", **FULL}


@pytest.fixture(scope="module", autouse=True)
def one_bucket() -> Iterator[None]:
    """Programs are what costs time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineConfig, "buckets", property(lambda self: (self.max_num_batched_tokens,)))
        yield


@pytest.fixture
def two_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps in one program want a bucket of nothing but decode rows."""
    monkeypatch.setattr(EngineConfig, "buckets", property(lambda self: (8, self.max_num_batched_tokens)))


@pytest.fixture(scope="module", params=KINDS, ids=NAMES)
def engine_of_kind(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with sibling(kv_cache_dtype=request.param, **SIZES) as engine:
        engine.warm_up()  # from here on compiling is an error
        yield engine


@pytest.fixture
def engine(engine_of_kind: Engine) -> Iterator[Engine]:
    with unburdened(engine_of_kind):
        yield engine_of_kind


def pool_of(engine: Engine) -> Any:
    return core_of(engine).runner.state.pool


def dtypes_of(engine: Engine) -> tuple[str, ...]:
    return engine.config.layer_dtypes(engine.model_config.num_layers)


@cache
def _forward(config: ModelConfig, dtypes: tuple[str, ...]) -> Any:
    """The whole sequence at once, keys and values rounded as each layer's format rounds them."""

    def kept(vectors: jax.Array, dtype: str) -> jax.Array:
        kind = FORMATS.get(dtype)
        return vectors if kind is None else dequantise(*quantise(vectors, kind))

    def attend(q: Any, k: Any, v: Any, kv: Any, layer: int, own: AttentionVariant) -> tuple[jax.Array, Any]:
        k, v = (kept(x, dtypes[layer]) for x in (k, v))
        return causal_attention(q, k, v, variant=own), kv

    parameters, merge = split_parameters(tiny_decoder(config))
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(merge(parameters)(tokens, attend=attend), axis=-1))
    return forward


def dense_logprobs(config: ModelConfig, dtypes: tuple[str, ...], tokens: Sequence[int]) -> np.ndarray:
    padded = np.zeros(128, np.int32)
    padded[: len(tokens)] = tokens
    return np.asarray(_forward(config, dtypes)(padded))[: len(tokens)]


def assert_as_dense(engine: Engine, output: RequestOutput) -> None:
    """Prompt log-probabilities are those of a forward pass over rounded keys and values, and of no other rounding."""
    tokens = output.prompt_token_ids
    found = np.array(
        [each[t].logprob for t, each in zip(tokens[1:], output.prompt_logprobs[1:], strict=True)]
    )
    plain = ("float32",) * engine.model_config.num_layers
    at = np.arange(len(tokens) - 1)
    own, other = (
        dense_logprobs(engine.model_config, dtypes, tokens)[at, tokens[1:]]
        for dtypes in (dtypes_of(engine), plain)
    )
    assert np.abs(found - own).max() < 0.2 * np.abs(found - other).max()


def test_it_is_attention_over_the_rounded_vectors(engine: Engine) -> None:
    (output,) = engine.generate(prompt_of(90), GREEDY.clone(prompt_logprobs=0, max_tokens=1))
    assert_as_dense(engine, output)


def test_tokens_do_not_depend_on_company_chunks_preemption_or_hits(engine: Engine) -> None:
    """Alone, prompts go in chunks of 16; together, in what is left of them; half of them are swapped."""
    alone = []
    for prompt, params in zip(PROMPTS, PARAMS, strict=True):
        engine.reset_prefix_cache()
        alone.append(tokens_of(engine.generate(prompt, params))[0])
    engine.reset_prefix_cache()
    before = engine.stats()
    assert tokens_of(engine.generate(PROMPTS, PARAMS)) == alone
    after = engine.stats()
    assert after.preemptions["swap"] > before.preemptions.get("swap", 0)
    hits = [output.num_cached_tokens or 0 for output in engine.generate(PROMPTS[:1], PARAMS[:1])]
    assert tokens_of(engine.generate(PROMPTS[:1], PARAMS[:1])) == alone[:1]
    assert hits[0] > 0
    assert core_of(engine).runner.forbid_compile


def test_samples_share_blocks(engine: Engine) -> None:
    (one,) = engine.generate(prompt_of(21), GREEDY)
    engine.reset_prefix_cache()
    (three,) = engine.generate(prompt_of(21), GREEDY.clone(n=3))
    assert [completion.token_ids for completion in three.outputs] == [one.outputs[0].token_ids] * 3


def test_beams_have_the_log_probabilities_of_their_tokens(engine: Engine) -> None:
    prompt, copied = prompt_of(13), engine.stats().blocks_copied
    (output,) = engine.beam_search(prompt, BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True))
    assert engine.stats().blocks_copied > copied
    for beam in output.outputs:
        text = [*prompt, *beam.token_ids]
        (scored,) = engine.generate(text, GREEDY.clone(prompt_logprobs=0, max_tokens=1))
        assert scored.prompt_logprobs is not None
        own = [
            entry[token].logprob for token, entry in list(zip(text, scored.prompt_logprobs, strict=True))[13:]
        ]
        assert beam.cumulative_logprob == pytest.approx(sum(own), abs=0.02)


def test_the_pool_is_written_where_it_is(engine: Engine) -> None:
    def places() -> list[int]:
        return [array.unsafe_buffer_pointer() for array in jax.tree.leaves(core_of(engine).runner.state)]

    before = places()
    engine.generate([prompt_of(21), prompt_of(30)], GREEDY.clone(n=3))
    assert places() == before


def test_what_is_swapped_in_has_the_bits_of_what_was_swapped_out(engine: Engine) -> None:
    engine.generate(prompt_of(90), GREEDY)
    runner = core_of(engine).runner

    def content(block: int) -> list[np.ndarray]:
        found = []
        for part in pool_of(engine).parts:
            for array in part.arrays:
                layers = np.asarray(array).reshape(part.num_layers, part.num_blocks, *array.shape[1:])
                found.append(layers[:, block].copy())
        return found

    before = content(2), content(3)
    assert all(array.astype(np.float32).any() for array in before[0])
    runner.move_blocks([Move(MoveKind.SWAP_OUT, 2, 7), Move(MoveKind.SWAP_OUT, 3, 5)])
    runner.move_blocks([Move(MoveKind.SWAP_IN, 5, 2), Move(MoveKind.SWAP_IN, 7, 3)])
    for block, expected in ((3, before[0]), (2, before[1])):
        for found, wanted in zip(content(block), expected, strict=True):
            assert found.dtype == wanted.dtype
            assert found.tobytes() == wanted.tobytes()
    engine.reset_prefix_cache()


def test_recomputing_gives_the_same_tokens_as_swapping(engine: Engine) -> None:
    kind = engine.config.kv_cache_dtype
    wanted = tokens_of(engine.generate(PROMPTS, PARAMS))
    with sibling(kv_cache_dtype=kind, **{**SIZES, "preemption_mode": "recompute"}) as other:
        other_runner, runner = core_of(other).runner, core_of(engine).runner
        other_runner._programs.update(runner._programs)
        other_runner._small.update(runner._small)
        assert tokens_of(other.generate(PROMPTS, PARAMS)) == wanted
        assert other.stats().preemptions["recompute"] > 0


# One mixed pool is enough for what does not look at the arrays.


def test_all_bits_are_the_same_with_deterministic(two_buckets: None) -> None:
    params = [each.clone(logprobs=2, max_tokens=12) for each in PARAMS]
    arguments = {**SIZES, "kv_cache_dtype": TWO_FORMATS, "num_blocks": 24, "num_scheduler_steps": 4}
    with new_engine(deterministic=True, **arguments) as engine, unburdened(engine):
        together = engine.generate(PROMPTS, params)
        assert [len(output.outputs[0].token_ids) for output in together] == [12] * len(PROMPTS)
        assert engine.stats().preemptions["swap"] > 0
        engine.reset_prefix_cache()
        for prompt, each, expected in zip(PROMPTS, params, together, strict=True):
            for _ in range(2):  # computed, and found in the cache
                (output,) = engine.generate(prompt, each)
                assert output.outputs == expected.outputs


def test_several_steps_in_one_program_and_a_step_ahead(two_buckets: None) -> None:
    kind = KINDS[-1]
    with sibling(kv_cache_dtype=kind, **SIZES) as engine:
        wanted = tokens_of(engine.generate(PROMPTS, PARAMS))
    with sibling(
        kv_cache_dtype=kind, **{**SIZES, "num_scheduler_steps": 4, "async_scheduling": True}
    ) as engine:
        assert tokens_of(engine.generate(PROMPTS, PARAMS)) == wanted
        seconds = None
        engine.add_request("x", prompt_of(20), GREEDY)
        while engine.has_unfinished_requests:
            engine.step()
            seconds = engine.measure_attention(1) or seconds
        assert seconds is not None


@pytest.mark.parametrize("dtypes", [("int8", "int4", "int8", "int4"), ("int8", "int8", "int4", "float32")])
def test_windows_of_mixed_layers(dtypes: tuple[str, ...]) -> None:
    """Groups of layers share blocks, in equal numbers of each format or, with a warning, not."""
    with sibling(HYBRID, kv_cache_dtype=dtypes, **SIZES) as engine:
        assert engine.config.kv_cache_dtype == dtypes
        (output,) = engine.generate(prompt_of(90), GREEDY.clone(prompt_logprobs=0, max_tokens=8))
        assert_as_dense(engine, output)


@pytest.mark.parametrize("kind", [*KINDS, *PLAIN], ids=[*NAMES, *PLAIN])
def test_a_block_takes_what_is_said(kind: Any) -> None:
    config, model = config_for(kind), CONFIG
    layout = kv_layout(model, config, None)
    pool = jax.eval_shape(lambda: _new_state(model, config, layout, 7)).pool
    assert bytes_per_block(model, config, layout) * 7 == tree_bytes(pool)
    assert isinstance(pool, MixedKVPool) == (not isinstance(kind, str))


def test_the_same_memory_holds_more_blocks() -> None:
    def blocks(kind: Any) -> int:
        config = config_for(kind, dtype="bfloat16", max_num_seqs=4096, max_num_batched_tokens=4096)
        layout = kv_layout(CONFIG, config, None)
        return num_blocks_for(CONFIG, config, layout, Gpu(2**20), 0, 0)

    plain = blocks("auto")
    # Vectors of 16: 32 bytes in bfloat16, 16 + 4 in eight bits, 8 + 4 in four.
    assert blocks("bfloat16") == plain == int(0.9 * 2**20) // (4 * 2 * 2 * 2 * 32)
    assert blocks("int8") == blocks("fp8") == pytest.approx(plain * 32 / 20, abs=1)
    assert blocks("int4") == pytest.approx(plain * 32 / 12, abs=1)
    assert blocks(("int4", "auto")) == pytest.approx(plain * 64 / 44, abs=1)


def test_layers_whose_windows_go_by_their_dtypes_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="jaxpaged.assembly"):
        kv_layout(HYBRID, config_for(("int8", "int4") * 2), None)
        assert not caplog.records
        layout = kv_layout(HYBRID, config_for(("int8", "int8", "int4", "int4")), None)
    assert sorted(layout.dtypes) == ["int4", "int4", "int8", "int8"]
    assert "50 % of the KV pool will hold nothing" in caplog.text


def config_for(kind: Any, **arguments: Any) -> EngineConfig:
    given = {
        "dtype": "float32",
        "max_model_len": 64,
        "max_num_seqs": 4,
        "block_size": 4,
        "kv_cache_dtype": kind,
    }
    return EngineConfig.resolve(given | arguments, platform="gpu", max_position_embeddings=256)


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_cache_dtype": "int3"}, r"kv_cache_dtype='int3': 'int3' is none of auto, float32, .*int4"),
        ({"kv_cache_dtype": ["int8", "Int8"]}, r"kv_cache_dtype=\['int8', 'Int8'\]: 'Int8' is none of"),
        ({"kv_cache_dtype": 8}, "kv_cache_dtype=8: must be a sequence"),
        ({"kv_cache_dtype": []}, r"kv_cache_dtype=\[\]: must be a sequence"),
        ({"kv_cache_dtype": [8, 8]}, r"kv_cache_dtype=\[8, 8\]: 8 is none of"),
        ({"kv_cache_dtype": ["int8"] * 3}, r"kv_cache_dtype=\(.*has 3 names, .* num_layers=2"),
        (
            {"kv_cache_dtype_skip_layers": [2]},
            r"kv_cache_dtype_skip_layers=\(2,\): the model has layers 0 to 1",
        ),
        ({"kv_cache_dtype_skip_layers": [-1]}, r"kv_cache_dtype_skip_layers=\[-1\]: -1 is no layer index"),
        ({"kv_cache_dtype_skip_layers": ["x"]}, "kv_cache_dtype_skip_layers=.*'x' is no layer index"),
        ({"kv_cache_dtype_skip_layers": [True]}, "kv_cache_dtype_skip_layers=.*True is no layer index"),
        ({"kv_cache_dtype_skip_layers": "0"}, "kv_cache_dtype_skip_layers='0': must be a sequence"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        new_engine(**arguments)


def test_a_named_attention_must_take_every_layer() -> None:
    bad = "'mosaic_gpu' cannot be used here"
    with pytest.raises(NotImplementedError, match=bad):
        new_engine(kv_cache_dtype=("float32", "int8"), attention="mosaic_gpu")


def test_names_come_to_names() -> None:
    def resolved(**arguments: Any) -> Any:
        engine = new_engine(num_blocks=40, **arguments)
        engine.close()
        return engine.config.kv_cache_dtype

    assert resolved() == resolved(kv_cache_dtype="auto") == "float32"
    assert resolved(kv_cache_dtype="fp8") == "fp8_e4m3"
    assert resolved(kv_cache_dtype=["fp8", "fp8_e4m3"]) == "fp8_e4m3"
    assert resolved(kv_cache_dtype="int8", kv_cache_dtype_skip_layers=["1"]) == ("int8", "float32")
    assert resolved(kv_cache_dtype=["int4", "auto"], kv_cache_dtype_skip_layers=[0, 1]) == "float32"


def test_the_names_are_those_of_the_formats() -> None:
    assert tuple(FORMATS) == QUANTISED
    assert set(ALIASES.values()) <= set(QUANTISED)


def test_the_command_line_takes_one_name_or_one_for_each_layer() -> None:
    names = ("int4", "fp8_e4m3", "int8", "int8", "int8", "float32")
    sizes: dict[str, Any] = {"num_blocks": 8, "max_model_len": 64, "max_num_seqs": 2}
    with EngineOptions(kv_cache_dtype="int4, fp8,int8,int8,int8,auto", **sizes).open() as engine:
        assert engine.config.kv_cache_dtype == names
        facts = gather(engine)
        assert facts["engine"]["kv_cache_dtype"] == names
        # Heads of 64: two vectors for each of two heads.
        assert facts["pool"]["bytes_per_token"] == 2 * 2 * (32 + 4 + 4 * (64 + 4) + 256)
        assert set(facts["attention"].split(", ")) <= {"xla", "numba"}
        (family,) = config_families(FamilyMaker("x"), engine.config, engine.stats())
        assert family.samples[0].labels["cache_dtype"] == (
            "int4 (1 layer), fp8_e4m3 (1 layer), int8 (3 layers), float32 (1 layer)"
        )
    with EngineOptions(kv_cache_dtype="int8", kv_cache_dtype_skip_layers="0, 5", **sizes).open() as engine:
        assert engine.config.kv_cache_dtype == ("float32", *["int8"] * 4, "float32")
