"""config.json of transformers 4 and 5, and what is refused."""

import dataclasses
from typing import Any

import pytest

from jaxpaged.models import CheckpointError, ModelConfig, RopeScaling, UnsupportedModelError, load_config
from tests.models.golden import NAMES, golden

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def config(**fields: Any) -> ModelConfig:
    return ModelConfig.from_hf({**LLAMA, **fields})


def family(architecture: str, **fields: Any) -> ModelConfig:
    return config(architectures=[architecture], num_key_value_heads=2, **fields)


@pytest.mark.parametrize("name", NAMES)
def test_to_hf_is_the_inverse_of_from_hf(name: str) -> None:
    read = load_config(golden(name).folder)
    assert ModelConfig.from_hf(read.to_hf()) == read
    assert hash(ModelConfig.from_hf(read.to_hf())) == hash(read)


def test_absent_fields_mean_what_transformers_takes_them_for() -> None:
    read = config()
    assert (read.num_kv_heads, read.head_dim, read.rms_norm_eps, read.rope_theta) == (4, 8, 1e-6, 10000.0)
    assert (read.bos_token_id, read.eos_token_ids, read.tie_word_embeddings) == (1, (2,), False)
    assert family("Qwen3ForCausalLM").head_dim == 128
    assert family("Qwen2ForCausalLM").attention_bias
    assert family("Qwen2ForCausalLM").eos_token_ids == ()


@pytest.mark.parametrize(
    ("version_4", "version_5"),
    [
        ({"rope_theta": 500.0}, {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}),
        (
            {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}},
        ),
        (
            {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3_SCALING}},
            {"rope_parameters": {"rope_theta": 500.0, "rope_type": "llama3", **LLAMA3_SCALING}},
        ),
    ],
)
def test_both_spellings_of_the_rotary_fields(version_4: dict[str, Any], version_5: dict[str, Any]) -> None:
    assert config(**version_4) == config(**version_5)
    assert config(**version_4).rope_theta == 500.0


def test_rope_scaling_is_read() -> None:
    assert config(rope_scaling=None).rope_scaling is None
    assert config(rope_scaling={"rope_type": "linear", "factor": 2.0}).rope_scaling == RopeScaling(
        "linear", 2.0
    )


def test_end_of_sequence_ids_are_merged() -> None:
    read = ModelConfig.from_hf({**LLAMA, "eos_token_id": [5, 6]}, {"eos_token_id": [6, 7]})
    assert read.eos_token_ids == (5, 6, 7)
    assert config(eos_token_id=None).eos_token_ids == ()


def test_sliding_windows_per_layer() -> None:
    assert family("MistralForCausalLM", sliding_window=8).sliding_windows == (8, 8)
    assert family("MistralForCausalLM", sliding_window=None).sliding_windows == (None, None)
    assert family("MistralForCausalLM").sliding_windows == (4096, 4096)
    assert family("Qwen2ForCausalLM", sliding_window=8).sliding_windows == (None, None)
    window = {"use_sliding_window": True, "sliding_window": 8}
    assert family("Qwen2ForCausalLM", **window, max_window_layers=1).sliding_windows == (None, 8)
    assert family("Qwen2ForCausalLM", **window, max_window_layers=2).sliding_windows == (None, None)
    kinds = ["sliding_attention", "full_attention"]
    assert family("Qwen3ForCausalLM", **window, layer_types=kinds).sliding_windows == (8, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", None),
        ("architectures", ["A", "B"]),
        ("vocab_size", 0),
        ("vocab_size", "128"),
        ("hidden_size", 32.5),
        ("num_hidden_layers", True),
        ("intermediate_size", None),
        ("head_dim", -1),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", "1e4"),
        ("rope_scaling", "linear"),
        ("tie_word_embeddings", "yes"),
        ("attention_bias", 1),
        ("eos_token_id", "2"),
        ("eos_token_id", [2, -1]),
        ("bos_token_id", 1.0),
    ],
)
def test_a_malformed_field_is_named_with_its_value(field: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=field) as caught:
        config(**{field: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, r"rope_scaling.rope_type='yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, r"rope_parameters.rope_type='dynamic'"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"num_key_value_heads": 3}, "num_heads=4.*num_kv_heads=3"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"eos_token_id": 128}, "token id 128.*vocab_size=128"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        config(**fields)


def test_a_configuration_made_by_hand_is_checked_too() -> None:
    good = config()
    with pytest.raises(UnsupportedModelError, match="vocab_size=0"):
        dataclasses.replace(good, vocab_size=0)
    with pytest.raises(UnsupportedModelError, match="sliding_windows has 1 entries for num_layers=2"):
        dataclasses.replace(good, sliding_windows=(None,))
    with pytest.raises(UnsupportedModelError, match=r"sliding_windows=\(0, None\)"):
        dataclasses.replace(good, sliding_windows=(0, None))
    with pytest.raises(UnsupportedModelError, match="rope_type='yarn'"):
        RopeScaling("yarn", 2.0)
    with pytest.raises(UnsupportedModelError, match=r"low_freq_factor=4\.0"):
        RopeScaling("llama3", 2.0, low_freq_factor=4.0)


def test_layer_types_must_be_known_and_complete() -> None:
    with pytest.raises(CheckpointError, match="layer_types"):
        family("Qwen2ForCausalLM", layer_types=["full_attention"])
    with pytest.raises(UnsupportedModelError, match="linear_attention"):
        family("Qwen2ForCausalLM", layer_types=["full_attention", "linear_attention"])


def test_llama3_scaling_needs_all_its_fields() -> None:
    with pytest.raises(CheckpointError, match="low_freq_factor"):
        config(rope_scaling={"rope_type": "llama3", "factor": 8.0})
