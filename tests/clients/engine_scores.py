"""What the engine itself says of the tasks in ``lm_eval_tasks``: ``python -m tests.clients.engine_scores FILE``.

Runs in the environment of the project; the check that compares it with lm-eval's results does not.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxpaged import Engine, SamplingParams
from jaxpaged.serve.options import EngineOptions

TASKS = Path(__file__).parent / "lm_eval_tasks"
# As in the server of the tests, so that their programs are compiled once.
ENGINE = EngineOptions(
    max_num_seqs=8, max_num_batched_tokens=256, max_model_len=512, num_scheduler_steps=1, warmup=False
)
# As in lm_eval_tasks/python_generate.yaml; besides its own, lm-eval stops at the text of the end token.
GENERATE = SamplingParams(max_tokens=16, temperature=0.0, stop=["\n", "<|endoftext|>"])


def documents(name: str) -> list[dict[str, Any]]:
    """The lines of a task's file."""
    return [json.loads(line) for line in (TASKS / name).read_text(encoding="utf-8").splitlines()]


def log_likelihood(engine: Engine, prefix: list[int], scored: list[int]) -> tuple[float, bool]:
    """The sum of the log-probabilities of ``scored`` after ``prefix``, and whether each was the likeliest."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    [output] = engine.generate([{"prompt_token_ids": prefix + scored}], params, use_tqdm=False)
    assert output.prompt_logprobs is not None
    places = list(zip(scored, output.prompt_logprobs[len(prefix) :], strict=True))
    found = [place[token] for token, place in places if place is not None]
    assert len(found) == len(scored)
    return sum(one.logprob for one in found), all(one.rank == 1 for one in found)


def choice_scores(engine: Engine, document: dict[str, Any]) -> list[tuple[float, bool]]:
    """Log-likelihood of each choice. As in lm-eval, spaces that end the context belong to the choice."""
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    context = document["context"]
    prefix = tokenizer.encode(context.rstrip(), add_special_tokens=False)
    scores = []
    for choice in document["choices"]:
        whole = tokenizer.encode(context + choice, add_special_tokens=False)
        scores.append(log_likelihood(engine, prefix, whole[len(prefix) :]))
    return scores


def text_score(engine: Engine, document: dict[str, Any]) -> float:
    """Log-likelihood of a text after the token that begins a document."""
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    begin = tokenizer.encode("")
    assert len(begin) == 1, "the tokenizer begins every text with one token"
    return log_likelihood(engine, begin, tokenizer.encode(document["text"], add_special_tokens=False))[0]


def texts_after(engine: Engine, contexts: Sequence[str], *, begin: bool) -> list[str]:
    """The greedy text after each context, which has the token that begins a document only if told so."""
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    ids = [tokenizer.encode(context, add_special_tokens=begin) for context in contexts]
    outputs = engine.generate([{"prompt_token_ids": one} for one in ids], GENERATE, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


def main(file: str) -> None:
    """Writes the scores as JSON, by task; "chat" are the generated texts of the chat endpoint."""
    choices, texts = documents("python_choice.jsonl"), documents("python_text.jsonl")
    contexts = [document["context"] for document in choices]
    with ENGINE.open() as engine:
        scores = {
            "jaxpaged_choice": [choice_scores(engine, document) for document in choices],
            "jaxpaged_text": [text_score(engine, document) for document in texts],
            "jaxpaged_generate": texts_after(engine, contexts, begin=False),
            "chat": texts_after(engine, contexts, begin=True),  # by its template
        }
    Path(file).write_text(json.dumps(scores), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
