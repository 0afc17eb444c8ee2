"""Engine sizes: every bad one is refused with its name and value."""

import re
from typing import Any

import pytest

from jaxpaged.config import EngineConfig
from jaxpaged.errors import InvalidRequestError

NAN, INF = float("nan"), float("inf")
BAD: list[tuple[str, Any]] = [
    ("dtype", "float8"),
    ("dtype", None),
    ("max_model_len", 0),
    ("max_model_len", 12.5),
    ("max_model_len", True),
    ("block_size", 0),
    ("block_size", -16),
    ("block_size", "16"),
    ("num_blocks", 1),
    ("num_blocks", 2.0),
    ("gpu_memory_utilization", 0.0),
    ("gpu_memory_utilization", 1.01),
    ("gpu_memory_utilization", NAN),
    ("gpu_memory_utilization", "0.9"),
    ("max_num_seqs", 0),
    ("max_num_seqs", None),
    ("max_num_batched_tokens", 0),
    ("max_num_batched_tokens", INF),
    ("max_num_batched_tokens", 255),  # fewer than max_num_seqs
    ("enable_prefix_caching", 1),
    ("seed", 0.5),
    ("seed", True),
    ("warmup", "yes"),
    ("max_logprobs", 0),
    ("logprobs_mode", "raw"),
    ("watermark", -0.1),
    ("watermark", 1.5),
    ("watermark", NAN),
    ("watermark", False),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(f"{name}={value!r}")) as raised:
        EngineConfig(**({"dtype": "float32", "max_model_len": 64} | {name: value}))
    assert isinstance(raised.value, ValueError)
    assert raised.value.argument == name


def resolve(platform: str = "cpu", max_position_embeddings: int = 512, **arguments: Any) -> EngineConfig:
    return EngineConfig.resolve(arguments, platform=platform, max_position_embeddings=max_position_embeddings)


def test_limits_are_allowed() -> None:
    config = EngineConfig(
        dtype="bfloat16",
        max_model_len=1,
        block_size=1,
        num_blocks=2,
        gpu_memory_utilization=1,
        max_num_seqs=1,
        max_num_batched_tokens=1,
        watermark=0,
    )
    assert config.buckets == (1,)
    assert config.table_width == 1


def test_table_width_covers_the_longest_sequence() -> None:
    widths = [resolve(max_model_len=n, block_size=16).table_width for n in (1, 16, 17, 512)]
    assert widths == [1, 1, 2, 32]


def test_defaults_follow_the_device() -> None:
    cpu, gpu = resolve(), resolve("gpu")
    assert (cpu.dtype, gpu.dtype) == ("float32", "bfloat16")
    assert cpu.max_num_batched_tokens < gpu.max_num_batched_tokens
    assert cpu.max_model_len == gpu.max_model_len == 512
    assert resolve(dtype=None, seed=None) == cpu, "None means the default"


def test_one_of_two_limits_given_adjusts_the_other() -> None:
    assert resolve(max_num_seqs=4096).max_num_batched_tokens >= 4096
    assert resolve(max_num_batched_tokens=8).max_num_seqs == 8
    with pytest.raises(InvalidRequestError, match="max_num_batched_tokens=8"):
        resolve(max_num_batched_tokens=8, max_num_seqs=9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_model_length": 5}, "max_model_length=5: is not an argument"),
        ({"max_model_len": 513}, "max_model_len=513.*max_position_embeddings=512"),
        ({"max_num_seqs": "many"}, "max_num_seqs='many'"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens=0"),
    ],
)
def test_resolve_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        resolve(**arguments)
