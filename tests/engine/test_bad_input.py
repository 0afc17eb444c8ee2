"""Each mistake is a ValueError that names argument and value, before anything changes; others go on untouched."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxpaged import Engine, SamplingParams, assembly
from jaxpaged.errors import (
    CheckpointError,
    InvalidRequestError,
    PromptTooLongError,
    RequestTooLargeError,
    UnknownRequestError,
    UnsupportedModelError,
)
from jaxpaged.models import embedded_model_path, save_model
from tests.engine.tiny import (
    CONFIG,
    GREEDY,
    SIZES,
    VOCAB_SIZE,
    drain,
    idle,
    new_engine,
    prompt_of,
    tiny_decoder,
)
from tests.text.tokenizers_made_here import byte_level

# What is wrong, and what the message has to name. "live" is the id of a request that runs.
Call = Callable[[Engine], Any]
NAN = float("nan")

BAD_PROMPTS: dict[str, tuple[Any, str]] = {
    "empty text": ("", "prompt=''"),
    "empty list": ([], r"prompt=\[\]"),
    "empty array": (np.zeros(0, np.int32), r"prompt=\[\]"),
    "empty ids": ({"prompt_token_ids": []}, r"prompt=\[\]"),
    "too long": (prompt_of(128), "prompt='128 tokens'.*max_model_len=128"),
    "far too long": (range(10**9), "prompt='1000000000 tokens'"),
    "too long text": ("cat " * 200, "prompt='.* tokens'.*max_model_len"),
    "out of vocabulary": ([3, VOCAB_SIZE], f"prompt_token_ids={VOCAB_SIZE}: .*vocab_size={VOCAB_SIZE}"),
    "negative": ([3, -1], "prompt_token_ids=-1"),
    "huge id": ([2**70], "prompt_token_ids=1180591620717411303424"),
    "numpy id": (np.array([3, 999]), "prompt_token_ids=999"),
    "float id": ([1.5], "prompt.*1.5"),
    "jax float": ([jnp.float32(1.5)], "prompt"),
    "float array": (np.array([1.5]), "prompt_token_ids=1.5"),
    "nan": ([3, NAN], "prompt.*nan"),
    "bool": ([3, True], "prompt.*True"),
    "none": (None, "prompts?=None"),
    "number": (5, "prompts?=5"),
    "bytes": (b"abc", "prompt=b'abc'"),
    "no ids": ({}, r"prompt=\{\}"),
    "both": ({"prompt": "a", "prompt_token_ids": [3]}, "prompt=.*needs either"),
    "unknown key": ({"prompt": "a", "promt": "b"}, "prompt='promt'"),
    "nested": ({"prompt": {"prompt": "a"}}, "prompt="),
    "matrix": ({"prompt_token_ids": np.zeros((2, 2), int)}, r"prompt_token_ids=\[0, 0\]"),
    "salt": ({"prompt": "a", "cache_salt": 5}, "cache_salt=5"),
    "surrogate": ("a\ud800", "text='a"),
    "salt surrogate": ({"prompt": "a", "cache_salt": "\ud800"}, "cache_salt="),
}

BAD_FIELDS: list[tuple[str, Any]] = [
    *itertools.product(["temperature"], [-1, NAN, math.inf, "hot", True, None]),
    *itertools.product(["top_p"], [0.0, -0.5, 1.01, NAN, None]),
    *itertools.product(["min_p"], [-0.1, 2.0, NAN]),
    *itertools.product(["top_k"], [-2, 1.5, True, "3"]),
    *itertools.product(["n"], [0, -1, 129, 10**12, 1.0, True, None, NAN]),
    *itertools.product(["repetition_penalty"], [0.0, -1.0, NAN, math.inf]),
    *itertools.product(["presence_penalty", "frequency_penalty"], [-2.1, 2.1, NAN, "x"]),
    *itertools.product(["max_tokens"], [0, -1, 1.5, True, NAN]),
    *itertools.product(["min_tokens"], [-1, 1.5, 100]),  # 100 is more than max_tokens
    *itertools.product(["logprobs", "prompt_logprobs"], [-2, 21, 10**9, 1.5, True]),
    *itertools.product(["seed"], [1.5, "x", 2**64, True]),
    *itertools.product(["stop_token_ids", "allowed_token_ids"], [[-1], [VOCAB_SIZE], [1.5], 5, "ab"]),
    ("stop_token_ids", itertools.count()),
    ("stop_token_ids", range(10**9)),
    ("allowed_token_ids", []),
    *itertools.product(["logit_bias"], [{VOCAB_SIZE: 1.0}, {-1: 1.0}, {3: NAN}, {3: 101.0}, {"x": 1.0}, [3]]),
    *itertools.product(["stop", "bad_words"], [[""], [5], 5, ["x"] * 200, ["y" * 5000]]),
    *itertools.product(["ignore_eos", "detokenize", "skip_special_tokens"], [1, None, "yes"]),
    ("output_kind", 7),
]

BAD_REQUESTS: dict[str, tuple[Call, type[ValueError], str]] = {
    "duplicate id": (lambda e: e.add_request("live", [3]), InvalidRequestError, "request_id='live'"),
    "empty id": (lambda e: e.add_request("", [3]), InvalidRequestError, "request_id=''"),
    "id of another type": (lambda e: e.add_request(5, [3]), InvalidRequestError, "request_id=5"),
    "params": (lambda e: e.add_request("x", [3], {}), InvalidRequestError, r"params=\{\}"),
    "salt": (lambda e: e.add_request("x", [3], cache_salt=5), InvalidRequestError, "cache_salt=5"),
    "stream params": (lambda e: e.stream([3], {"n": 1}), InvalidRequestError, "sampling_params="),
    "stream prompt": (lambda e: e.stream([-3]), InvalidRequestError, "prompt_token_ids=-3"),
    "stream duplicate": (
        lambda e: e.stream([3], request_id="live"),
        InvalidRequestError,
        "request_id='live'",
    ),
    "params of another type": (lambda e: e.generate([3], 5), InvalidRequestError, "sampling_params=5"),
    "params missing": (lambda e: e.generate([[3], [4]], [GREEDY]), InvalidRequestError, "sampling_params=1"),
    "params too many": (lambda e: e.generate([3], [GREEDY] * 2), InvalidRequestError, "sampling_params=2"),
    "params of a mix": (
        lambda e: e.generate([[3], [4]], [GREEDY, None]),
        InvalidRequestError,
        "sampling_params=None",
    ),
    "last of many": (lambda e: e.generate([[3], [4], [-5]]), InvalidRequestError, "prompt_token_ids=-5"),
    "unknown id": (lambda e: e.abort_request("nobody"), UnknownRequestError, "request_id='nobody'"),
    "too long": (lambda e: e.generate(prompt_of(128)), PromptTooLongError, "128 tokens"),
}


def state_of(engine: Engine) -> dict[str, Any]:
    """Everything that a refused request must leave alone."""
    return {**asdict(engine.stats()), "tables": engine.block_tables()}


def check_refused(engine: Engine, call: Call, message: str, error: type[ValueError]) -> None:
    before = state_of(engine)
    with pytest.raises(error, match=message):
        call(engine)
    assert state_of(engine) == before
    engine.check_invariants()


def test_requests_that_run_do_not_notice_bad_ones() -> None:
    """Two engines do the same; one of them is also asked for everything that is wrong."""

    def run(disturb: bool) -> list[Any]:
        bad = iter(all_bad_calls())
        seen = []
        with new_engine() as engine, idle(engine):
            engine.add_request("live", prompt_of(30), GREEDY.clone(max_tokens=60, n=2, logprobs=1))
            engine.add_request("drawn", prompt_of(9), SamplingParams(max_tokens=60, ignore_eos=True))
            while engine.has_unfinished_requests:
                for call, error, message in itertools.islice(bad, 3 if disturb else 0):
                    check_refused(engine, call, message, error)
                seen += [(output.request_id, output.outputs) for output in engine.step()]
            assert not disturb or next(bad, None) is None
            # Without a seed: what it draws depends on the requests that were admitted before it.
            (last,) = engine.generate(prompt_of(5), SamplingParams(max_tokens=20, n=2))
            return [*seen, last.outputs]

    assert run(disturb=True) == run(disturb=False)


def all_bad_calls() -> list[tuple[Call, type[ValueError], str]]:
    calls = list(BAD_REQUESTS.values())
    for prompt, message in BAD_PROMPTS.values():
        calls.append((lambda e, p=prompt: e.add_request("new", p), InvalidRequestError, message))
        calls.append((lambda e, p=prompt: e.generate([[3], p]), InvalidRequestError, message))
        calls.append((lambda e, p=prompt: e.stream(p), InvalidRequestError, message))
    for name, value in BAD_FIELDS:
        calls.append((lambda e, n=name, v=value: with_field(e, n, v), InvalidRequestError, f"^{name}="))
    return calls


def with_field(engine: Engine, name: str, value: Any) -> None:
    engine.add_request("new", [3], SamplingParams(**{name: value}))


@pytest.mark.parametrize("name", [name for name in BAD_PROMPTS if not name.startswith("empty")])
def test_one_bad_prompt(engine: Engine, name: str) -> None:
    prompt, message = BAD_PROMPTS[name]
    check_refused(engine, lambda e: e.generate(prompt), message, InvalidRequestError)


def test_unknown_parameters(engine: Engine) -> None:
    with pytest.raises(InvalidRequestError, match=r"temprature=0\.5"):
        SamplingParams.from_dict({"temprature": 0.5})
    with pytest.raises(InvalidRequestError, match="max_seqs=3: is not an argument"):
        Engine(tiny_decoder(), max_seqs=3)


def test_a_request_that_can_never_fit_the_pool() -> None:
    sizes = {"num_blocks": 8, "max_num_seqs": 2, "max_num_batched_tokens": 2, "num_scheduler_steps": 1}
    with new_engine(**sizes) as engine, idle(engine):  # 28 tokens
        prompt = prompt_of(20)
        with pytest.raises(RequestTooLargeError, match=r"20 prompt \+ 10 output tokens.*8 blocks of 4 .* 7"):
            engine.add_request("x", prompt, GREEDY.clone(max_tokens=10))
        with pytest.raises(RequestTooLargeError):
            engine.generate(prompt, GREEDY.clone(max_tokens=None))
        engine.add_request("x", prompt, GREEDY.clone(max_tokens=9, n=3))  # the last token needs no slot
        assert [len(c.token_ids) for c in drain(engine)["x"].outputs] == [9, 9, 9]


def test_without_a_tokenizer() -> None:
    with new_engine(tokenizer=None) as engine, idle(engine):
        for call, name in (
            (lambda: engine.generate("text"), "prompt='text'"),
            (lambda: engine.generate([3], GREEDY.clone(stop=["x"])), r"stop=\('x',\)"),
            (lambda: engine.generate([3], GREEDY.clone(bad_words=["x"])), "bad_words="),
        ):
            with pytest.raises(InvalidRequestError, match=f"{name}.*tokenizer"):
                call()


BAD_ARGUMENTS: list[tuple[str, Any]] = [
    *itertools.product(
        [
            "max_num_seqs",
            "max_num_batched_tokens",
            "block_size",
            "max_model_len",
            "num_blocks",
            "max_logprobs",
        ],
        [0, -1, 1.5, "4", True, NAN, [4]],
    ),
    ("max_num_batched_tokens", 4),  # fewer than max_num_seqs
    ("num_blocks", 1),
    ("max_model_len", 129),
    *itertools.product(["gpu_memory_utilization"], [0, -0.1, 1.1, NAN, "0.5", True]),
    *itertools.product(["watermark"], [-0.1, 1.1, NAN, "x"]),
    *itertools.product(["seed"], [1.5, "x", True]),
    *itertools.product(["enable_prefix_caching", "warmup"], [1, "yes", 0.0]),
    *itertools.product(["attention"], ["flash", 5, ["xla"]]),
    *itertools.product(["dtype"], ["float64", "int8", 5, "bfloat16", ["float32"]]),
    *itertools.product(["logprobs_mode"], ["logits", 5, []]),
    *itertools.product(["tokenizer"], ["gpt2", 5]),
    *itertools.product(["variant"], ["alibi", 5]),
    *itertools.product(["compilation_cache_dir"], [5, ["x"]]),
    *itertools.product(["params"], [5, {}, [1.0], {"embedding": np.zeros(3)}]),
]


@pytest.mark.parametrize(("name", "value"), BAD_ARGUMENTS, ids=repr)
def test_bad_arguments_of_the_constructor(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{name}="):
        Engine(tiny_decoder(), **{**SIZES, name: value})


@pytest.mark.parametrize("model", [5, None, "", b"x", ["x"], {}], ids=repr)
def test_a_model_of_the_wrong_type(model: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"^model="):
        Engine(model)


def test_weights_that_do_not_fit_the_decoder() -> None:
    model = tiny_decoder()

    def refused(change: Callable[[Any], Any], message: str) -> None:
        params = nnx.to_pure_dict(nnx.state(model))
        change(params)
        with pytest.raises(InvalidRequestError, match=message):
            Engine(model, params, **SIZES)

    refused(lambda p: p.pop("embedding"), "params='embedding': is missing")
    refused(lambda p: p.update(extra=jnp.zeros(3)), "params='extra': is not a parameter")
    refused(
        lambda p: p.update(embedding=jnp.zeros((3, 3))), r"params='embedding: \(3, 3\)': must be \(384, 64\)"
    )
    refused(lambda p: p.update(embedding=p["embedding"].astype(int)), "params='embedding.*float")
    refused(lambda p: p.update(embedding="zeros"), "params='embedding: str'")
    with pytest.raises(InvalidRequestError, match=r"params=.*not with a checkpoint folder"):
        Engine("folder", nnx.state(model))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_model(tiny_decoder(), tmp_path, dtype=jnp.float32)
    byte_level()._backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_missing_files(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        Engine(checkpoint / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Engine(checkpoint / "config.json")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Engine(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Engine.from_pretrained(str(checkpoint))


def test_truncated_files(checkpoint: Path) -> None:
    for name, keep in (("model.safetensors", 0.9), ("model.safetensors", 0), ("tokenizer.json", 0.5)):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: int(len(content) * keep)])
        with pytest.raises(CheckpointError, match=name):
            Engine(checkpoint, **SIZES)
        (checkpoint / name).write_bytes(content)


def test_tensors_and_architectures_that_do_not_fit(checkpoint: Path) -> None:
    weights, config = checkpoint / "model.safetensors", checkpoint / "config.json"
    tensors = load_file(weights)
    name = "model.layers.1.mlp.down_proj.weight"
    for changed, message in (
        ({name: tensors[name][:, :-1].copy()}, f"{name}.*shape"),
        ({name: tensors[name].astype(np.int32)}, name),
    ):
        save_file({**tensors, **changed}, weights)
        with pytest.raises(CheckpointError, match=message):
            Engine(checkpoint, **SIZES)
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM"):
        Engine(checkpoint, **SIZES)


def test_a_tokenizer_larger_than_the_model() -> None:
    small = tiny_decoder(replace(CONFIG, vocab_size=100))
    with Engine(small, **{**SIZES, "tokenizer": byte_level()}) as engine:
        with pytest.raises(InvalidRequestError, match=r"prompt_token_ids=.*vocab_size=100"):
            engine.generate("hello the cat")
        with pytest.raises(InvalidRequestError, match="logit_bias=100"):
            engine.generate([3], GREEDY.clone(logit_bias={100: 1.0}))
        # A word that the model cannot say needs no ban.
        word = byte_level().decode([307])
        assert byte_level().encode(word, add_special_tokens=False) == [307]
        engine.add_request("x", [3], GREEDY.clone(bad_words=[word]))
        engine.abort_request("x")
        assert [output.request_id for output in engine.step()] == ["x"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scheduling_policy", "lifo"),
        ("tenant_weights", {"a": 0}),
        ("memory_warning", 2),
        ("memory_critical", 0.5),
    ],
)
def test_wrong_arguments_of_the_scheduler_are_found_before_weights_are_read(
    monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    monkeypatch.setattr(assembly, "load_model", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(InvalidRequestError) as caught:
        Engine(embedded_model_path(), **{name: value})
    assert (caught.value.argument, caught.value.value) == (name, value)
