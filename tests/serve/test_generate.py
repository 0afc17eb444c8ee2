"""``jaxpaged generate``: prompts from everywhere, text in order, JSON, every sampling option."""

import json
from pathlib import Path

from jaxpaged import SamplingParams
from jaxpaged.serve.options import SamplingOptions
from tests.serve.command_line import run, run_small

GREEDY = ("--temperature", "0", "--max-tokens", "6")


def test_prompts_come_out_in_their_order_streamed_or_not(checkpoint: Path) -> None:
    arguments = ("def main(", "the cat", "-n", "2", "--max-tokens", "5", "--seed", "3")
    streamed = run_small("generate", checkpoint, *arguments).stdout
    whole = run_small("generate", checkpoint, *arguments, "--no-stream").stdout
    assert streamed == whole
    headers = [line.partition(" ─")[0] for line in streamed.splitlines() if "─" in line]
    expected = [f"prompt {p} of 2, completion {c} of 2" for p in (1, 2) for c in (1, 2)]
    assert headers == expected


def test_the_prompt_is_shown_on_request(checkpoint: Path) -> None:
    plain = run_small("generate", checkpoint, "def main(", *GREEDY).stdout
    echoed = run_small("generate", checkpoint, "def main(", *GREEDY, "--echo").stdout
    assert echoed.strip() == "def main(" + plain.strip()


def test_prompts_from_arguments_files_and_pipes(checkpoint: Path, tmp_path: Path) -> None:
    text, lines = tmp_path / "prompt.py", tmp_path / "prompts.jsonl"
    text.write_text("the mat\n")
    lines.write_text('"a b c"\n\n[5, 6, 7]\n{"prompt_token_ids": [8]}\n')
    arguments = ("the cat", "-f", text, "-f", lines, "-f", "-", "--json", *GREEDY)
    result = run_small("generate", checkpoint, *arguments, stdin="def x\n")
    outputs = [json.loads(line) for line in result.stdout.splitlines()]
    assert [output["prompt"] for output in outputs] == ["the cat", "the mat", "a b c", None, None, "def x"]
    assert [output["prompt_token_ids"] for output in outputs[3:5]] == [[5, 6, 7], [8]]
    piped = run_small("generate", checkpoint, "--json", *GREEDY, stdin="def x\n").stdout
    assert json.loads(piped)["outputs"] == outputs[-1]["outputs"]


def test_json_has_tokens_logprobs_and_reasons(checkpoint: Path) -> None:
    arguments = ("the cat", "--json", "--logprobs", "2", "--prompt-logprobs", "1", *GREEDY)
    output = json.loads(run_small("generate", checkpoint, *arguments).stdout)
    [completion] = output["outputs"]
    assert completion["finish_reason"] == "length"
    assert len(completion["token_ids"]) == len(completion["logprobs"]) == 6
    assert completion["logprobs"][0][str(completion["token_ids"][0])]["rank"] == 1
    assert len(output["prompt_logprobs"]) == len(output["prompt_token_ids"])


def test_the_same_seed_gives_the_same_text(checkpoint: Path) -> None:
    texts = [
        run_small("generate", checkpoint, "the", "--max-tokens", "12", "--seed", seed).stdout
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_checkpoint_without_tokenizer_works_on_token_ids(checkpoint: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (bare / name).symlink_to(checkpoint / name)
    prompts = tmp_path / "ids.jsonl"
    prompts.write_text("[5, 6, 7]")
    shown = run_small("generate", bare, "-f", prompts, *GREEDY, "--ignore-eos").stdout.split()
    assert len(shown) == 6
    assert all(token.isdigit() for token in shown)
    refused = run("generate", "text", "--model", bare)
    assert refused.exit_code == 2
    assert "no tokenizer" in refused.stderr


def test_every_sampling_option_reaches_the_parameters() -> None:
    options = SamplingOptions(
        max_tokens=9,
        min_tokens=2,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        n=3,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.3,
        stop=["x"],
        stop_token_id=[4],
        include_stop=True,
        ignore_eos=True,
        logprobs=1,
        prompt_logprobs=2,
        logit_bias=["3:-1.5", "4:2"],
        allowed_token_id=[3, 4],
        bad_word=["bad"],
        keep_special_tokens=True,
    )
    assert options.params(seed=5) == SamplingParams(
        max_tokens=9,
        min_tokens=2,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        n=3,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.3,
        stop=["x"],
        stop_token_ids=[4],
        include_stop_str_in_output=True,
        ignore_eos=True,
        logprobs=1,
        prompt_logprobs=2,
        logit_bias={3: -1.5, 4: 2.0},
        allowed_token_ids=[3, 4],
        bad_words=["bad"],
        skip_special_tokens=False,
        seed=5,
    )
    assert SamplingOptions().params() == SamplingParams()


def test_the_embedded_model_completes_python() -> None:
    result = run("generate", "import os\nimport ", "-t", "0", "--max-tokens", "12", "--num-blocks=64")
    assert result.exit_code == 0, result.output
    assert result.stdout.split()[0].isidentifier()
