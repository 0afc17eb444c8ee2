"""Qwen 3 (dense): RMS norms over the head dimension of q and k before the rotary embedding."""

from typing import Any

from jaxpaged.models.families.family import LLAMA_MODULES, Family
from jaxpaged.models.families.fields import HfFields
from jaxpaged.models.families.qwen2 import qwen_windows, qwen_windows_to_hf


def _traits(fields: HfFields) -> dict[str, Any]:
    bias = fields.boolean("attention_bias")
    return {
        "attention_bias": bias,
        "attention_out_bias": bias,
        "mlp_bias": False,
        "qk_norm": True,
        "sliding_windows": qwen_windows(fields),
    }


def _to_hf(config: Any) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias, **qwen_windows_to_hf(config)}


FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    defaults={
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    traits=_traits,
    to_hf=_to_hf,
    modules={
        **LLAMA_MODULES,
        "q_norm": "model.layers.{layer}.self_attn.q_norm",
        "k_norm": "model.layers.{layer}.self_attn.k_norm",
    },
)
