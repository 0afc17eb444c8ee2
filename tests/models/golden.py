"""The tiny checkpoints under ``goldens/`` and what Hugging Face transformers computed from them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

GOLDENS = Path(__file__).parent / "goldens"
NAMES = sorted(folder.name for folder in GOLDENS.iterdir())
NEW_TOKENS = 16  # of the tokens, those that were generated greedily


@dataclass(frozen=True)
class Golden:
    """tokens int32 [T], the greedy ones last, and their logits float32 [T, V]."""

    folder: Path
    tokens: np.ndarray
    logits: np.ndarray


def golden(name: str) -> Golden:
    arrays = load_file(GOLDENS / name / "golden.safetensors")
    return Golden(GOLDENS / name, arrays["tokens"], arrays["logits"])
