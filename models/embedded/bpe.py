"""Byte-level BPE for the embedded model (Sennrich et al. 2016, arXiv:1508.07909; bytes as in GPT-2)."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

VOCAB_SIZE = 4096
BOUNDARY = "<|endoftext|>"  # begins a document and ends the one before; id 0


def train_tokenizer(texts: Iterable[str]) -> Any:
    """A ``tokenizers.Tokenizer`` that puts ``BOUNDARY`` before every text it encodes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    # Runs of spaces stay whole (indentation), digits go in threes, words take one leading space.
    pattern = r"\n+[ ]*|[ ]+(?=[ ])|[ ]?[A-Za-z]+|\d{1,3}|[ ]?[^\sA-Za-z\d]+|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOUNDARY],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOUNDARY} $A", special_tokens=[(BOUNDARY, tokenizer.token_to_id(BOUNDARY))]
    )
    return tokenizer


def encode_all(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text, uint16 [length], the boundary first."""
    return [np.asarray(encoding.ids, np.uint16) for encoding in tokenizer.encode_batch(list(texts))]
