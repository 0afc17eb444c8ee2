"""Makes ``goldens/``: tiny seeded Hugging Face checkpoints, with what transformers computes from them.

Not run by the tests. It needs torch and transformers (made with torch 2.13.0 on a CPU and transformers 5.23.0):

    python tests/models/make_goldens.py
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

GOLDENS = Path(__file__).parent / "goldens"
PROMPT_LENGTH = 24
NEW_TOKENS = 16
# head_dim * num_attention_heads is not hidden_size, on purpose.
SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def models() -> dict[str, tuple[PreTrainedModel, torch.dtype, str]]:
    """Name -> (model, dtype on disk, largest shard)."""
    qwen2 = Qwen2Config(
        **SIZES, tie_word_embeddings=True, use_sliding_window=True, sliding_window=8, max_window_layers=1
    )
    biased = LlamaConfig(**SIZES, rope_parameters=LINEAR, attention_bias=True, mlp_bias=True)
    return {
        "llama2": (LlamaForCausalLM(LlamaConfig(**SIZES)), torch.float32, "1GB"),
        "llama3": (LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3)), torch.bfloat16, "20KB"),
        "llama_linear": (LlamaForCausalLM(biased), torch.float16, "1GB"),
        "mistral": (MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)), torch.bfloat16, "1GB"),
        "qwen2": (Qwen2ForCausalLM(qwen2), torch.bfloat16, "1GB"),
        "qwen3": (Qwen3ForCausalLM(Qwen3Config(**SIZES)), torch.bfloat16, "1GB"),
    }


def randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Weights large enough for every part of the arithmetic to show in the logits."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)


def make(name: str, model: PreTrainedModel, dtype: torch.dtype, shard: str, seed: int) -> None:
    """One checkpoint with its prompt, logits and greedy continuation, computed in float32 from what is on disk."""
    generator = torch.Generator().manual_seed(seed)
    randomise(model, generator)
    folder = GOLDENS / name
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    model = type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    prompt = torch.randint(3, SIZES["vocab_size"], (1, PROMPT_LENGTH), generator=generator)
    tokens = prompt
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            logits = model(tokens, use_cache=False).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        logits = model(tokens, use_cache=False).logits
    golden = {"tokens": tokens[0].int().contiguous(), "logits": logits[0].float().contiguous()}
    save_file(golden, folder / "golden.safetensors")


if __name__ == "__main__":
    for seed, (name, (model, dtype, shard)) in enumerate(models().items()):
        make(name, model, dtype, shard, seed)
