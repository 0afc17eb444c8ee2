"""Qwen 2 and 2.5: Llama with biases on q, k and v, and an optional window from ``max_window_layers`` on."""

from typing import Any

from jaxpaged.models.families.family import LLAMA_MODULES, Family, sliding_windows
from jaxpaged.models.families.fields import HfFields


def qwen_windows(fields: HfFields) -> tuple[int | None, ...]:
    """Window per layer; ``sliding_window`` counts only where ``use_sliding_window`` is true."""
    window = fields.optional_int("sliding_window") if fields.boolean("use_sliding_window") else None
    return sliding_windows(fields, window, fields.optional_int("max_window_layers") or 0)


def qwen_windows_to_hf(config: Any) -> dict[str, Any]:
    """The inverse of ``qwen_windows``."""
    windows = [window for window in config.sliding_windows if window is not None]
    return {
        "use_sliding_window": bool(windows),
        "sliding_window": windows[0] if windows else None,
        "layer_types": [
            "full_attention" if w is None else "sliding_attention" for w in config.sliding_windows
        ],
    }


def _traits(fields: HfFields) -> dict[str, Any]:
    return {
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "sliding_windows": qwen_windows(fields),
    }


FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    defaults={
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    traits=_traits,
    to_hf=qwen_windows_to_hf,
    modules=LLAMA_MODULES,
)
