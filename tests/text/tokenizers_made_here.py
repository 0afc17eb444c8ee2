"""Small tokenizers of the kinds that checkpoints have, trained or put together on the spot."""

from functools import cache

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jaxpaged.tokenizer import Tokenizer

LINES = [
    "def main(x):",
    "    return héllo wörld 😀😀 日本語 日本",
    "the cat sat on the mat, the mat",
    "print('a b c')",
]
SPECIAL = ["<s>", "</s>", "<|im｜end|>"]


def byte_level_backend() -> tokenizers.Tokenizer:
    """Like GPT-2, Llama 3, Qwen: byte-level BPE, with special tokens and one plain added token."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(LINES * 4, trainer)
    backend.add_tokens(["<tool call>", "ünï"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def byte_fallback_backend() -> tokenizers.Tokenizer:
    """Like Llama 2: spaces are U+2581, what the vocabulary lacks is spelt in byte tokens."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ("▁", "▁the", "▁cat", "at", "a", "b", "▁é", "日本", "."):
        vocab[piece] = len(vocab)
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def wordpiece_backend() -> tokenizers.Tokenizer:
    """Pieces joined by spaces unless they begin with ##."""
    words = ["[UNK]", "the", "cat", "##s", "sat", ".", "it", "##'", "dog"]
    backend = tokenizers.Tokenizer(
        models.WordPiece({word: place for place, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.decoder = decoders.WordPiece(cleanup=False)
    return backend


@cache
def byte_level() -> Tokenizer:
    return Tokenizer(byte_level_backend(), bos_token="<s>", eos_token="</s>")


@cache
def byte_fallback() -> Tokenizer:
    return Tokenizer(byte_fallback_backend(), bos_token="<s>", eos_token="</s>")


@cache
def wordpiece() -> Tokenizer:
    return Tokenizer(wordpiece_backend())
