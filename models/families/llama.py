"""Llama 2 and 3 (and the many checkpoints that follow their layout)."""

from typing import Any

from jaxpaged.models.families.family import LLAMA_MODULES, Family
from jaxpaged.models.families.fields import HfFields


def _traits(fields: HfFields) -> dict[str, Any]:
    bias = fields.boolean("attention_bias")
    return {
        "attention_bias": bias,
        "attention_out_bias": bias,
        "mlp_bias": fields.boolean("mlp_bias"),
        "qk_norm": False,
        "sliding_windows": (None,) * fields.positive_int("num_hidden_layers"),
    }


def _to_hf(config: Any) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


FAMILY = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    defaults={
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    traits=_traits,
    to_hf=_to_hf,
    modules=LLAMA_MODULES,
)
