"""Convert a Hugging Face Llama checkpoint to GGUF, for the llama.cpp adapter.

Only token ids go in and out, so the file names no tokenizer and llama.cpp runs without a vocabulary.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

_GLOBAL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """Translate the name of a tensor."""
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    layer, inner = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_LAYER_NAMES[inner.removesuffix('.weight')]}.weight"


def interleave_rotary(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection.

    Hugging Face rotates channel ``i`` with channel ``i + head_dim / 2``; GGUF's llama architecture rotates
    channel ``2 i`` with channel ``2 i + 1``.
    """
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def _write_header(writer: object, config: dict) -> None:
    """Write the hyperparameters."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def _add_tensors(writer: object, checkpoint: Path, config: dict, dtype: str) -> None:
    """Add every tensor; norms stay float32, as llama.cpp wants them."""
    import gguf
    from safetensors import safe_open

    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    with safe_open(checkpoint / "model.safetensors", framework="np") as tensors:
        names = tensors.keys()
        for name in names:
            weight = tensors.get_tensor(name).astype(np.float32)
            kind = name.split(".")[-2]
            if kind in heads:
                weight = interleave_rotary(weight, heads[kind])
            if dtype == "bfloat16" and weight.ndim == 2:
                kind = gguf.GGMLQuantizationType.BF16
                writer.add_tensor(gguf_name(name), gguf.quants.quantize(weight, kind), raw_dtype=kind)
            else:
                writer.add_tensor(gguf_name(name), weight)


def convert(checkpoint: Path, dtype: str) -> Path:
    """Return the GGUF file of a checkpoint, kept next to its weights; it is written on the first call."""
    import gguf

    source, target = checkpoint / "model.safetensors", checkpoint / f"model-{dtype}.gguf"
    if target.exists() and target.stat().st_mtime >= source.stat().st_mtime:
        return target
    config = json.loads((checkpoint / "config.json").read_text())
    partial = target.with_suffix(f".{os.getpid()}.partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_file_type(
        gguf.LlamaFileType.MOSTLY_BF16 if dtype == "bfloat16" else gguf.LlamaFileType.ALL_F32
    )
    _write_header(writer, config)
    _add_tensors(writer, checkpoint, config, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(target)
    return target
