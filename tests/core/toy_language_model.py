"""A language model made up on the spot: log-probabilities from a seed and all tokens so far. Needs only Python."""

import math
import random
from collections.abc import Sequence

VOCAB = 6


def log_probabilities(seed: int, history: Sequence[int], vocab_size: int = VOCAB) -> list[float]:
    """Those of the next token; the same on every machine and in every Python."""
    source = random.Random(f"{seed}: {' '.join(map(str, history))}")
    logits = [4.0 * source.random() for _ in range(vocab_size)]
    log_sum = math.log(math.fsum(map(math.exp, logits)))
    return [logit - log_sum for logit in logits]
