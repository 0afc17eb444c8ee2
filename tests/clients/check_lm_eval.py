"""lm-eval's ``local-completions`` on local tasks: its log-likelihoods are those of the engine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clients.served import Served

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "tests" / "clients" / "lm_eval_tasks"
TOLERANCE = 1e-4  # of a log-likelihood, a sum over up to 300 tokens


def samples(served: Served, folder: Path, model: str, route: str, tasks: list[str], **arguments: int) -> Any:
    """Each task's answers, document by document, in a run of lm-eval's own command."""
    given: dict[str, Any] = {
        "model": served.model,
        "base_url": f"{served.api}/{route}",
        "tokenizer_backend": "huggingface",
        "tokenizer": served.folder,
        "max_length": served.max_model_len,
        "max_retries": 1,
        "num_concurrent": arguments["num_concurrent"],
    }
    command = [sys.executable, "-m", "lm_eval", "run", "--model", model, "--tasks", *tasks]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in given.items())]
    command += ["--batch_size", str(arguments["batch_size"]), "--include_path", str(TASKS)]
    command += ["--output_path", str(folder), "--log_samples"]
    if model == "local-chat-completions":
        command.append("--apply_chat_template")
    own = {"OPENAI_API_KEY": served.key, "HF_HOME": str(folder / "hub")}
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found: dict[str, list[Any]] = {}
    for task in tasks:
        [file] = folder.rglob(f"samples_{task}_*.jsonl")
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found[task] = [line["resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]
    return found


@pytest.fixture(scope="module")
def scores(served: Served) -> dict[str, Any]:
    """What the engine says, by task."""
    return json.loads(Path(served.scores).read_text(encoding="utf-8"))


@pytest.fixture(
    scope="module", params=[(1, 1), (4, 4)], ids=["one by one", "four requests at a time of four prompts"]
)
def answers(request: pytest.FixtureRequest, served: Served, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What lm-eval had from the server, by task."""
    concurrent, batch = request.param
    tasks = ["jaxpaged_choice", "jaxpaged_text", "jaxpaged_generate"]
    folder = tmp_path_factory.mktemp("lm_eval")
    sizes = {"num_concurrent": concurrent, "batch_size": batch}
    return samples(served, folder, "local-completions", "completions", tasks, **sizes)


def check_log_likelihoods_are_the_engines(answers: dict[str, Any], scores: dict[str, Any]) -> None:
    for document, expected in zip(answers["jaxpaged_choice"], scores["jaxpaged_choice"], strict=True):
        # Written as text: a choice is [["-1.5", "False"]].
        found = [float(choice[0][0]) for choice in document]
        assert found == pytest.approx([value for value, _ in expected], abs=TOLERANCE)
        assert [choice[0][1] for choice in document] == [str(greedy) for _, greedy in expected]


def check_rolling_log_likelihoods_are_the_engines(answers: dict[str, Any], scores: dict[str, Any]) -> None:
    found = [float(document[0][0]) for document in answers["jaxpaged_text"]]
    assert found == pytest.approx(scores["jaxpaged_text"], abs=TOLERANCE)


def check_generated_texts_are_the_engines(answers: dict[str, Any], scores: dict[str, Any]) -> None:
    assert [document[0][0] for document in answers["jaxpaged_generate"]] == scores["jaxpaged_generate"]


def check_answers_of_a_chat_are_the_engines(served: Served, scores: dict[str, Any], tmp_path: Path) -> None:
    tasks = ["jaxpaged_generate"]
    sizes = {"num_concurrent": 2, "batch_size": 1}
    found = samples(served, tmp_path, "local-chat-completions", "chat/completions", tasks, **sizes)
    assert [document[0][0] for document in found["jaxpaged_generate"]] == scores["chat"]


def check_the_scores_tell_texts_apart(scores: dict[str, Any]) -> None:
    """Otherwise the comparisons above would say little."""
    choices = [choice for document in scores["jaxpaged_choice"] for choice in document]
    values = [value for value, _ in choices]
    assert len(values) == 24
    assert max(values) - min(values) > 20
    assert {greedy for _, greedy in choices} == {False, True}
    assert len(set(scores["jaxpaged_generate"])) > 4
