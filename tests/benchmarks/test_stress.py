"""The stress run, for five seconds on the tiny model: nothing is left, and it would say so."""

import random

import pytest

from benchmarks import stress
from tests.engine.family import sibling
from tests.engine.tiny import CONFIG, GREEDY, SIZES, prompt_of


def test_five_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    assert (stress.TINY, stress.TINY_SIZES) == (CONFIG, SIZES)  # so its programs lie in the cache
    arguments = ["--seconds", "5", "--rate", "200", "--tiny", "--async-scheduling"]
    assert stress.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "nothing is left" in printed
    for kind in ("add", "abort", "fork", "stream", "read", "drop", "swap", "length"):
        assert kind in printed


def test_what_is_left_is_found() -> None:
    with sibling(num_host_blocks=20) as engine:
        crowd = stress.Crowd(engine, random.Random(0))
        assert stress.left_over(engine, crowd) == []
        engine.add_request("x", prompt_of(9), GREEDY)
        engine.step()
        (blocks, requests) = stress.left_over(engine, crowd)
        assert blocks == "3 blocks are held"
        assert requests == "requests without an end: ['x'] []"
        crowd.leave()
        # Another token than before the same prompt, which is no tie.
        (output,) = engine.generate(prompt_of(9), GREEDY)
        said = output.outputs[0].token_ids
        crowd.said.compare((1,), [*prompt_of(9), *said])
        crowd.said.compare((1,), [*prompt_of(9), (said[0] + 1) % 300, *said[1:]])
        (wrong,) = stress.left_over(engine, crowd)
        assert wrong.startswith("1 requests said something else")
