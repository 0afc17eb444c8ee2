"""The checkpoint that comes with the package."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from jaxpaged.models import Decoder, embedded_model_path, load_config, load_model
from jaxpaged.models.embedded.evaluate import complete, model_nats
from jaxpaged.models.embedded.train import CONFIG
from jaxpaged.models.parameters import split_parameters

FOLDER = embedded_model_path()
# Not from the training text.
SOURCE = '''"""Counting words."""

import collections
import sys


def count_words(path):
    """Return a Counter of the words in the file at path."""
    counter = collections.Counter()
    with open(path, encoding="utf-8") as file:
        for line in file:
            counter.update(line.split())
    return counter


def main():
    if len(sys.argv) != 2:
        print("usage: words.py file", file=sys.stderr)
        sys.exit(2)
    for word, count in count_words(sys.argv[1]).most_common(10):
        print(word, count)


if __name__ == "__main__":
    main()
'''


@pytest.fixture(scope="module")
def model() -> Decoder:
    return load_model(FOLDER, dtype=jnp.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def test_the_folder_is_small_and_whole() -> None:
    names = {file.name for file in FOLDER.iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "README.md", "loss.png"}
    assert expected | {"tokenizer.json", "tokenizer_config.json"} <= names
    assert sum(file.stat().st_size for file in FOLDER.iterdir() if file.is_file()) < 12e6
    assert load_config(FOLDER) == CONFIG


def test_it_has_the_size_it_says() -> None:
    parameters, _ = split_parameters(load_model(FOLDER))
    assert sum(array.size for array in parameters.values()) == 5_475_584
    assert {str(array.dtype) for array in parameters.values()} == {"bfloat16"}


def test_the_tokenizer_fits_the_model(tokenizer: Any) -> None:
    assert tokenizer.get_vocab_size() == CONFIG.vocab_size
    ids = tokenizer.encode(SOURCE).ids
    assert ids[0] == CONFIG.bos_token_id
    assert tokenizer.decode(ids) == SOURCE


def test_it_predicts_python_it_has_not_seen(model: Decoder, tokenizer: Any) -> None:
    tokens = np.asarray(tokenizer.encode(SOURCE).ids, np.int32)
    bits_per_byte = model_nats(model, tokens, window=512) / math.log(2) / len(SOURCE.encode())
    assert bits_per_byte < 1.3


def test_greedy_completions_are_python(model: Decoder, tokenizer: Any) -> None:
    prompts = [
        "import os\nimport sys\n\nclass Stack:\n    def __init__(",
        "for i in range(",
        '\nif __name__ == "__',
    ]
    texts = complete(model, tokenizer, prompts, max_tokens=6)
    assert texts[0].startswith("self")
    assert ")" in texts[1] or "," in texts[1]
    assert texts[2].startswith("main__")
