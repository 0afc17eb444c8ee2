"""Mistral 7B and its kin: Llama without biases, with one sliding window for all layers."""

from typing import Any

from jaxpaged.models.families.family import LLAMA_MODULES, Family
from jaxpaged.models.families.fields import HfFields


def _traits(fields: HfFields) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "attention_out_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "sliding_windows": (fields.optional_int("sliding_window"),)
        * fields.positive_int("num_hidden_layers"),
    }


def _to_hf(config: Any) -> dict[str, Any]:
    return {"sliding_window": config.sliding_windows[0]}


FAMILY = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    defaults={
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    traits=_traits,
    to_hf=_to_hf,
    modules=LLAMA_MODULES,
)
