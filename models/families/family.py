"""What one model family is to us: the fields its config.json leaves out, its traits, its tensor names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxpaged.models.families.fields import HfFields

# Part of the decoder -> Hugging Face module name; "{layer}" is filled in by the checkpoint reader.
# All four families agree on these; a family lists only what it adds.
LLAMA_MODULES: Mapping[str, str] = {
    "embed": "model.embed_tokens",
    "attn_norm": "model.layers.{layer}.input_layernorm",
    "q": "model.layers.{layer}.self_attn.q_proj",
    "k": "model.layers.{layer}.self_attn.k_proj",
    "v": "model.layers.{layer}.self_attn.v_proj",
    "attn_out": "model.layers.{layer}.self_attn.o_proj",
    "mlp_norm": "model.layers.{layer}.post_attention_layernorm",
    "gate": "model.layers.{layer}.mlp.gate_proj",
    "up": "model.layers.{layer}.mlp.up_proj",
    "down": "model.layers.{layer}.mlp.down_proj",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
}


@dataclass(frozen=True)
class Family:
    """One row of the family table.

    ``defaults`` are what the family's Hugging Face config class assumes for absent fields; ``traits``
    reads the fields only this family has and returns the matching ``ModelConfig`` arguments; ``to_hf``
    is its inverse, given those arguments back.
    """

    architecture: str
    model_type: str
    defaults: Mapping[str, Any]
    traits: Callable[[HfFields], dict[str, Any]]
    to_hf: Callable[[Any], dict[str, Any]]
    modules: Mapping[str, str]


def sliding_windows(fields: HfFields, window: int | None, first_sliding_layer: int) -> tuple[int | None, ...]:
    """Window per layer: from ``layer_types`` when the config lists them, else from ``first_sliding_layer`` on."""
    num_layers = fields.positive_int("num_hidden_layers")
    layer_types = fields.optional_list("layer_types")
    if layer_types is None:
        return tuple(window if layer >= first_sliding_layer else None for layer in range(num_layers))
    if len(layer_types) != num_layers:
        raise fields.malformed("layer_types", f"one entry for each of the {num_layers} layers")
    known = {"full_attention": None, "sliding_attention": window}
    for kind in layer_types:
        if kind not in known:
            raise fields.unsupported("layer_types", f"only {sorted(known)}, not {kind!r}")
    return tuple(known[kind] for kind in layer_types)
