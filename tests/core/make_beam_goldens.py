"""Makes ``beam_goldens.json``: what Hugging Face transformers finds by beam search in the toy language model.

Not run by the tests. It needs torch and a transformers that still has diverse beam search (made with torch 2.13.0
on a CPU and transformers 4.52.4; 5.23.0 gives the same for one group):

    python tests/core/make_beam_goldens.py
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

sys.path.insert(0, str(Path(__file__).parent))
from toy_language_model import VOCAB, log_probabilities

GOLDENS = Path(__file__).parent / "beam_goldens.json"
PROMPT = [0, 1]


class ToyModel(PreTrainedModel, GenerationMixin):
    """The toy language model, computed for the last position only."""

    config_class = PretrainedConfig
    seed = 0

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutput:
        rows = [log_probabilities(self.seed, tokens[len(PROMPT) :]) for tokens in input_ids.tolist()]
        return CausalLMOutput(logits=torch.tensor(rows)[:, None, :])


def cases() -> list[dict[str, Any]]:
    """Settings of one group that can stop, and of several groups over models without a stop token."""
    stopping = [
        {
            "seed": seed,
            "beam_width": width,
            "max_tokens": 8,
            "eos": eos,
            "length_penalty": penalty,
            "early_stopping": early,
        }
        for width, penalty, early in itertools.product(
            (2, 3, 5), (-1.0, 0.0, 1.0, 2.0), (True, False, "never")
        )
        for seed, eos in ((width, [5]), (width + 10, [4, 5]))
    ]
    groups = [
        {
            "seed": seed,
            "beam_width": width,
            "max_tokens": 5,
            "eos": [],
            "num_beam_groups": num_groups,
            "diversity_penalty": penalty,
        }
        for seed, (width, num_groups, penalty) in enumerate(
            itertools.product((4, 6), (2, 4, 3), (0.3, 1.0, 5.0))
        )
        if width % num_groups == 0
    ]
    return stopping + groups


def search(model: ToyModel, case: dict[str, Any]) -> list[tuple[list[int], float]]:
    """Generated tokens and score of each hypothesis, best first."""
    model.seed = case["seed"]
    width = case["beam_width"]
    config = GenerationConfig(
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=case["max_tokens"],
        eos_token_id=case["eos"] or None,
        pad_token_id=VOCAB,  # no token of the model, so that padding can be told apart
        length_penalty=case.get("length_penalty", 1.0),
        early_stopping=case.get("early_stopping", False),
        return_dict_in_generate=True,
        output_scores=True,
        use_cache=False,
        do_sample=False,
    )
    if "num_beam_groups" in case:
        config.num_beam_groups = case["num_beam_groups"]
        config.diversity_penalty = case["diversity_penalty"]
    found = model.generate(torch.tensor([PROMPT]), generation_config=config)
    hypotheses = []
    for row, score in zip(found.sequences.tolist(), found.sequences_scores.tolist(), strict=True):
        tokens = [token for token in row[len(PROMPT) :] if token != VOCAB]
        hypotheses.append((tokens, round(score, 5)))
    return hypotheses


def main() -> None:
    """Write the file, one case a line."""
    model = ToyModel(PretrainedConfig(vocab_size=VOCAB))
    lines = [json.dumps(case | {"hypotheses": search(model, case)}) for case in cases()]
    GOLDENS.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
