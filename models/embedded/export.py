"""Writes a trained model as a Hugging Face folder, the tokenizer and its configuration included."""

import json
from pathlib import Path

from jaxpaged.models.checkpoint import save_model
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.embedded.bpe import BOUNDARY

# The model continues text and knows no turns: a conversation is one document that grows.
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


def export(model: Decoder, tokenizer_json: str, folder: Path) -> None:
    """bfloat16 weights, config.json, generation_config.json, tokenizer.json and tokenizer_config.json."""
    save_model(model, folder)
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOUNDARY,
        "eos_token": BOUNDARY,
        "model_max_length": model.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(tokenizer_config, indent=2) + "\n", encoding="utf-8"
    )
