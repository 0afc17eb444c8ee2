"""Arithmetic of ``jaxpaged bench serve``: options, arrivals, workloads, and every definition of a figure."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxpaged.serve.bench_serve.arrivals import arrival_times
from jaxpaged.serve.bench_serve.client import Failure
from jaxpaged.serve.bench_serve.dataset import BenchItem, make_dataset, read_dataset
from jaxpaged.serve.bench_serve.figures import (
    Outcome,
    client_figures,
    distribution,
    errors,
    figures,
    peak_concurrency,
)
from jaxpaged.serve.bench_serve.load import LoadRun
from jaxpaged.serve.bench_serve.options import BenchServeOptions, Endpoint
from jaxpaged.serve.bench_serve.plot import save_plot, token_rate

# Sent at 10, tokens at 10.5, 10.7 and 11.5, the stream ends at 11.6; five tokens in three chunks.
FIRST = Outcome(0, 10.0, 10.0, 11.6, token_times=(10.5, 10.7, 11.5), output_len=5, prompt_len=7)
# Sent 0.25 s late, one token, so that it has neither TPOT nor gaps.
SECOND = Outcome(1, 10.0, 10.25, 11.0, token_times=(10.75,), output_len=1, prompt_len=3)
FAILED = Outcome(2, 11.0, 11.0, 14.0, failure=Failure("status 500", "boom"))


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def options(**values: Any) -> BenchServeOptions:
    made = BenchServeOptions(**values)
    made.check()
    return made


def test_definitions_of_a_request() -> None:
    assert FIRST.ttft == pytest.approx(0.5)
    assert FIRST.e2el == pytest.approx(1.6)
    assert FIRST.tpot == pytest.approx((1.6 - 0.5) / (5 - 1))
    assert FIRST.itl == pytest.approx([0.2, 0.8])
    assert (SECOND.tpot, SECOND.itl, SECOND.wait) == (None, [], 0.25)


def test_figures_of_a_run() -> None:
    run = LoadRun(started=10.0, ended=14.0, num_unfinished=1)
    result = figures([FIRST, SECOND, FAILED], run, (50, 99.9), {"ttft": 0.5, "tpot": 0.2})
    assert result["seconds"] == 4.0
    assert (result["completed"], result["failed"], result["unfinished"]) == (2, 1, 1)
    assert (result["prompt_tokens"], result["output_tokens"]) == (10, 6)
    assert result["requests_per_second"] == 2 / 4
    assert result["output_tokens_per_second"] == 6 / 4
    assert result["total_tokens_per_second"] == 16 / 4
    assert result["tokens_per_chunk"] == 6 / 4
    assert result["ttft"]["mean"] == pytest.approx(0.5)
    assert result["tpot"]["p99.9"] == pytest.approx(0.275)
    assert result["itl"]["mean"] == pytest.approx(0.5)
    assert result["e2el"]["p50"] == pytest.approx((1.6 + 0.75) / 2)
    assert result["wait"]["max"] == 0.25
    # The first misses its TPOT; the second has none to miss; the failed one is not good.
    assert result["goodput"]["requests_per_second"] == 1 / 4
    assert result["goodput"]["share_of_requests"] == pytest.approx(1 / 3)


def test_an_objective_is_met_when_it_is_reached_exactly() -> None:
    assert SECOND.meets({"ttft": SECOND.ttft, "tpot": 1e-9, "e2el": SECOND.e2el})
    assert not SECOND.meets({"ttft": math.nextafter(SECOND.ttft, 0)})
    assert not FAILED.meets({})


def test_a_run_of_which_nothing_is_known() -> None:
    result = figures([], LoadRun(3.0, 3.0, num_unfinished=4), (50,), {"ttft": 1.0})
    assert result["requests_per_second"] is None
    assert result["ttft"] is None
    assert result["goodput"]["share_of_requests"] is None
    assert result["tokens_per_chunk"] is None
    unknown = figures([Outcome(0, 0, 0, 1, (0.5,), 1)], LoadRun(0.0, 1.0), (50,), {})
    assert (unknown["prompt_tokens"], unknown["total_tokens_per_second"], unknown["goodput"]) == (
        None,
        None,
        None,
    )


def test_who_counted_the_tokens_is_told() -> None:
    chunks = Outcome(3, 0, 0, 1, (0.5,), 1, is_counted_by_server=False)
    run = LoadRun(0.0, 1.0)
    told = [figures(ones, run, (50,), {})["output_tokens_counted_by"] for ones in ([FIRST], [chunks], [])]
    assert told == ["usage", "chunks", None]
    assert figures([FIRST, chunks], run, (50,), {})["output_tokens_counted_by"] == "both"


def test_distributions() -> None:
    assert distribution([], (50,)) is None
    expected = {"mean": 2.0, "std": 1.0, "min": 1.0, "max": 3.0, "p50": 2.0, "p90": 2.8}
    assert distribution([1.0, 3.0], (50, 90)) == pytest.approx(expected)


def test_peak_concurrency_counts_neither_ends_nor_beginnings_twice() -> None:
    def between(sent: float, ended: float) -> Outcome:
        return Outcome(0, sent, sent, ended)

    assert peak_concurrency([]) == 0
    assert peak_concurrency([between(0, 1), between(1, 2), between(2, 3)]) == 1
    assert peak_concurrency([between(0, 4), between(1, 2), between(1.5, 3), between(2.5, 5)]) == 3


def test_errors_are_counted_by_kind_with_the_message_of_the_first() -> None:
    def failed(ended: float, kind: str, message: str) -> Outcome:
        return Outcome(0, 0, 0, ended, failure=Failure(kind, message))

    found = errors(
        [failed(3, "timeout", "b"), FIRST, failed(1, "timeout", "a"), failed(2, "status 429", "c")]
    )
    assert found == [
        {"kind": "timeout", "count": 2, "first": "a"},
        {"kind": "status 429", "count": 1, "first": "c"},
    ]


def test_what_the_client_cost() -> None:
    found = client_figures(LoadRun(0.0, 4.0, cpu_seconds=1.0, num_connections=3), 1000)
    assert (found["cpu_share"], found["cpu_per_chunk"], found["connections"]) == (0.25, 0.001, 3)
    assert client_figures(LoadRun(0.0, 0.0), 0)["cpu_share"] is None


def test_tokens_a_second_over_time_add_up() -> None:
    edges, rates = token_rate([FIRST, SECOND], 10.0)
    assert edges[0] == 0
    assert edges[-1] == pytest.approx(1.5)
    assert float((rates * np.diff(edges)).sum()) == pytest.approx(6)
    assert token_rate([], 10.0)[1].sum() == 0


def test_a_picture_of_few_and_of_equal_times(tmp_path: Path) -> None:
    at_once = Outcome(0, 0.0, 0.0, 3.0, token_times=(3.0, 3.0, 3.0), output_len=3)
    for name, outcomes in (("none", []), ("failed", [FAILED]), ("one", [SECOND]), ("equal", [at_once])):
        path = tmp_path / f"{name}.png"
        save_plot(path, outcomes, 0.0, name, {"ttft": 0.2})
        assert path.read_bytes().startswith(b"\x89PNG")


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert arrival_times(3, (math.inf, math.inf), 1.0, rng()) == [0.0, 0.0, 0.0]
    assert arrival_times(1, (2.0, 2.0), 1.0, rng()) == [0.0]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_are_gamma_distributed_with_the_mean_of_the_rate(burstiness: float) -> None:
    times = arrival_times(20_001, (5.0, 5.0), burstiness, rng())
    gaps = np.diff(times)
    assert times[0] == 0.0
    assert times[-1] == pytest.approx(20_000 / 5.0)  # exactly what was asked for
    assert gaps.min() >= 0
    # A gamma distribution of shape k has the coefficient of variation 1 / sqrt(k) and the skewness 2 / sqrt(k).
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)
    skewness = float(((gaps - gaps.mean()) ** 3).mean() / gaps.std() ** 3)
    assert skewness == pytest.approx(2 * burstiness**-0.5, rel=0.15)


def test_arrivals_are_those_of_the_seed() -> None:
    again = [arrival_times(50, (3.0, 3.0), 1.0, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]


def test_a_ramp_goes_from_one_rate_to_the_other() -> None:
    gaps = np.diff(arrival_times(10_001, (1.0, 9.0), 1.0, rng()))
    assert gaps[:500].mean() == pytest.approx(1 / 1.2, rel=0.1)
    assert gaps[-500:].mean() == pytest.approx(1 / 8.8, rel=0.1)


def test_texts_among_the_options() -> None:
    given = options(
        goodput="ttft:200 tpot:50,e2el:5000",
        ramp="1:20",
        metric_percentiles="50, 99.9 50",
        percentile_metrics="itl,ttft",
        extra_body='{"top_p": 0.5}',
    )
    assert given.objectives == {"ttft": 0.2, "tpot": 0.05, "e2el": 5.0}
    assert given.rates == (1.0, 20.0)
    assert given.percentiles == (50.0, 99.9)
    assert given.metrics == ("itl", "ttft")
    assert given.fields == {"top_p": 0.5}
    assert options().objectives == {}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"goodput": "itl:5"}, "itl:5"),
        ({"goodput": "ttft"}, "'ttft'"),
        ({"goodput": "ttft:-1"}, "ttft:-1"),
        ({"goodput": "ttft:x"}, "ttft:x"),
        ({"goodput": "ttft:1 ttft:2"}, "twice"),
        ({"goodput": " "}, "no objective"),
        ({"request_rate": 0.0}, "--request-rate=0.0"),
        ({"request_rate": math.nan}, "--request-rate=nan"),
        ({"burstiness": 0.0}, "--burstiness=0.0"),
        ({"burstiness": math.inf}, "--burstiness=inf"),
        ({"ramp": "1"}, "--ramp='1'"),
        ({"ramp": "0:5"}, "--ramp='0:5'"),
        ({"ramp": "1:5", "request_rate": 3.0}, "--request-rate=3.0"),
        ({"metric_percentiles": "101"}, "--metric-percentiles"),
        ({"metric_percentiles": "p50"}, "--metric-percentiles"),
        ({"percentile_metrics": "ttft,speed"}, "'speed'"),
        ({"extra_body": "[1]"}, "--extra-body"),
        ({"extra_body": "{"}, "--extra-body"),
        ({"random_range_ratio": 1.0}, "--random-range-ratio=1.0"),
        ({"name": "W1"}, "--workload=W1"),
        ({"api_key": "a\r\nb"}, "--api-key"),
        ({"save_detailed": True}, "--json"),
        ({"json": Path("nowhere") / "x.json"}, "nowhere"),
    ],
)
def test_options_that_do_not_hold_are_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match="--") as caught:
        options(**values)
    assert named in str(caught.value)


def test_a_plot_without_matplotlib_is_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("jaxpaged.serve.bench_serve.options.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        options(plot=tmp_path / "x.png")


def test_the_record_of_the_options_holds_no_key() -> None:
    record = options(api_key="secret", request_rate=4.0).record()
    assert "secret" not in json.dumps(record, allow_nan=False)
    assert (record["request_rate"], options().record()["request_rate"]) == (4.0, "inf")


def test_random_prompts_have_the_lengths_that_were_asked_for() -> None:
    given = options(
        num_prompts=400,
        num_warmups=2,
        random_input_len=100,
        random_output_len=10,
        random_range_ratio=0.25,
        random_prefix_len=32,
        random_vocab_size=300,
    )
    made = make_dataset(given, rng())
    lengths = [len(item.prompt) - 32 for item in made.items]
    assert (min(lengths), max(lengths)) == (75, 125)
    assert {item.out for item in made.items} == set(range(7, 14))
    assert all(item.prompt[:32] == made.items[0].prompt[:32] for item in made.items)
    assert len({tuple(item.prompt[32:]) for item in made.items}) == 400
    ids = {i for item in made.items for i in item.prompt}
    assert max(ids) < 300
    # A warm-up must not put the common prefix into a prefix cache.
    assert all(item.prompt[:32] != made.items[0].prompt[:32] for item in made.warmups)
    assert make_dataset(given, rng()) == made


def test_random_prompts_of_a_chat_are_words() -> None:
    made = make_dataset(options(endpoint=Endpoint.CHAT, num_prompts=3, random_input_len=9), rng())
    assert all(isinstance(item.prompt, str) and len(item.prompt.split()) == 9 for item in made.items)


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_files_of_requests(tmp_path: Path) -> None:
    strict = [{"prompt": [5, 6], "out": 3}, {"prompt": "a b", "out": 2}]
    loose = [{"prompt": "x", "id": 1}, {"conversations": [{"from": "human", "value": "hi"}, {"value": "yo"}]}]
    listed = write(tmp_path, "list.json", json.dumps(strict))
    named = write(tmp_path, "named.json", json.dumps({"W1": strict, "W2": strict[:1]}))
    lines = write(tmp_path, "lines.jsonl", "\n".join(map(json.dumps, [*strict, *loose])) + "\n\n")
    both = write(tmp_path, "both.json", json.dumps(strict + loose))
    exact = [BenchItem([5, 6], 3), BenchItem("a b", 2)]
    assert read_dataset(listed) == exact
    assert read_dataset(named, "W2") == exact[:1]
    assert read_dataset(lines) == read_dataset(both) == [*exact, BenchItem("x", None), BenchItem("hi", None)]


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("a.json", "[", "not JSON"),
        ("a.jsonl", '{"prompt": "x"}\n{', "line 2"),
        ("a.jsonl", "", "no request"),
        ("a.json", "[]", "not empty"),
        ("a.json", '[{"text": "x"}]', "request 0"),
        ("a.json", '[{"prompt": "x"}, {"prompt": ["x"]}]', "request 1"),
        ("a.json", '[{"prompt": "x"}, 3]', "request 1"),
        ("a.json", '[{"prompt": "x", "out": 0, "id": 1}]', "out=0"),
        ("a.json", '{"W1": [], "W2": []}', "--workload"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, name: str, text: str, named: str) -> None:
    with pytest.raises(ValueError, match="WORKLOAD") as caught:
        read_dataset(write(tmp_path, name, text))
    assert named in str(caught.value)


def test_names_of_lists_and_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_dataset(tmp_path / "missing.json")
    with pytest.raises(ValueError, match="--workload=W1"):
        read_dataset(write(tmp_path, "a.jsonl", '{"prompt": "x"}'), "W1")


def test_a_file_is_repeated_cut_and_given_other_lengths(tmp_path: Path) -> None:
    items = [{"prompt": "one two", "out": 3}, {"prompt": "three", "out": 2}]
    path = str(write(tmp_path, "list.json", json.dumps(items)))
    five = make_dataset(options(workload=path, num_prompts=5, output_len=9, num_warmups=1), rng())
    assert [item.prompt for item in five.items] == ["one two", "three", "one two", "three", "one two"]
    assert {item.out for item in five.items} == {9}
    assert five.warmups == [BenchItem("two one", 9)]
    assert five.describe() == {"name": "list.json", "requests": 5, "distinct": 2}
    assert make_dataset(options(workload=path, num_prompts=1), rng()).num_distinct == 1


def test_a_chat_takes_no_token_ids(tmp_path: Path) -> None:
    path = str(write(tmp_path, "list.json", '[{"prompt": [1, 2], "out": 3}]'))
    with pytest.raises(ValueError, match="request 0: --endpoint chat"):
        make_dataset(options(workload=path, endpoint=Endpoint.CHAT), rng())
