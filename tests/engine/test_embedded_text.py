"""Text in, text out, with the model that comes with the package."""

from collections.abc import Iterator

import pytest

from jaxpaged import Engine, SamplingParams
from jaxpaged.config import EngineConfig
from jaxpaged.models import embedded_model_path, load_model
from tests.engine.tiny import is_dense_greedy

PROMPTS = [
    "def __init__(self, name):\n    self.",
    "import os\nimport ",
    "# naïve café 日本語 😀\nx = '",
    "for i in range(",
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def embedded() -> Iterator[Engine]:
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "num_blocks": 64, "max_model_len": 256}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineConfig, "buckets", property(lambda self: (8, 32)))
        with Engine(embedded_model_path(), dtype="float32", num_scheduler_steps=1, **sizes) as engine:
            yield engine


def test_its_greedy_text_is_that_of_the_plain_decoder(embedded: Engine) -> None:
    model = load_model(embedded_model_path(), dtype="float32")
    assert embedded.tokenizer is not None
    for output in embedded.generate(PROMPTS, GREEDY):
        (completion,) = output.outputs
        assert is_dense_greedy(output.prompt_token_ids, completion.token_ids, model)
        assert completion.text == embedded.tokenizer.decode(completion.token_ids)


def test_it_has_learnt_python(embedded: Engine) -> None:
    """``self.`` takes up a name that the signature has."""
    (output,) = embedded.generate(PROMPTS[0], GREEDY.clone(max_tokens=8))
    assert output.outputs[0].text.startswith("name = name")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_streams_add_up(embedded: Engine, prompt: str) -> None:
    params = GREEDY.clone(temperature=1.5, seed=11, max_tokens=60)
    (whole,) = embedded.generate(prompt, params)
    parts = [part.outputs[0].text for part in embedded.stream(prompt, params)]
    assert "".join(parts) == whole.outputs[0].text
    assert len(parts) > 10


def test_stop_strings_cross_tokens(embedded: Engine) -> None:
    (free,) = embedded.generate(PROMPTS[0], GREEDY)
    text = free.outputs[0].text
    for begin in range(0, 12, 3):
        stop = text[begin : begin + 5]
        (output,) = embedded.generate(PROMPTS[0], GREEDY.clone(stop=["\0", stop]))
        assert output.outputs[0].text == text[: text.index(stop)]
        assert output.outputs[0].stop_reason == stop
