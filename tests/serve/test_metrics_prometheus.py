"""What Prometheus gets: names, values, formats, bounds on labels, costs."""

import threading
import time
from collections.abc import Callable, Iterator

import prometheus_client
import pytest

from jaxpaged import Engine, EngineStats, SamplingParams
from jaxpaged.serve.metrics.engine_metrics import COUNTERS, GAUGES, holder_buckets
from jaxpaged.serve.metrics.exposition import wants_openmetrics
from jaxpaged.serve.metrics.http_metrics import MAX_REASONS, MAX_ROUTES
from jaxpaged.serve.metrics.prometheus import ENGINE_STATES, HISTOGRAMS, PrometheusMetrics
from tests.engine.tiny import GREEDY, idle, new_engine, prompt_of, shared_engine
from tests.serve.metrics_exposition import (
    OPENMETRICS,
    Key,
    families,
    iteration,
    names,
    request,
    samples,
    value,
)

GIVEN = EngineStats(device_memory_in_use=3 << 30, block_holders={1: 2, 2: 1, 100: 1}, num_blocks=10)

# vLLM's names: what a dashboard made for it asks for, with our prefix.
OF_VLLM = {
    "gauge": "num_requests_running num_requests_waiting kv_cache_usage_perc cache_config_info",
    "counter": "prefix_cache_queries prefix_cache_hits num_preemptions prompt_tokens generation_tokens request_success",
    "histogram": "iteration_tokens_total time_to_first_token_seconds inter_token_latency_seconds "
    "e2e_request_latency_seconds request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds "
    "request_inference_time_seconds request_time_per_output_token_seconds request_prompt_tokens "
    "request_generation_tokens",
}
OF_THE_FOUNDING_DOCUMENTS = {
    "gauge": "num_free_blocks alloc_rate reuse_rate fragmentation refcount_hist gpu_mem_used kv_mem_used",
    "histogram": "attention_latency_seconds",
}


@pytest.fixture
def metrics() -> Iterator[PrometheusMetrics]:
    made = PrometheusMetrics("tiny")
    yield made
    made.check_invariants()


@pytest.fixture
def engine() -> Iterator[Engine]:
    with idle(shared_engine()) as shared:
        yield shared


def test_names_and_kinds_are_those_that_dashboards_know(metrics: PrometheusMetrics, engine: Engine) -> None:
    metrics.set_engine(engine.config, engine.memory_report())
    found = families(metrics, GIVEN)
    kinds = {family.name: family.type for family in found}
    for wanted in (OF_VLLM, OF_THE_FOUNDING_DOCUMENTS):
        for kind, listed in wanted.items():
            for name in listed.split():
                assert kinds.get(f"jaxpaged:{name}") == kind, name
    exposed = {sample.name for family in found for sample in family.samples}
    assert {"jaxpaged:prefix_cache_hits_total", "jaxpaged:prompt_tokens_total"} <= exposed
    assert {"process_cpu_seconds_total", "python_info"} <= exposed


def test_every_metric_of_ours_names_the_model_and_has_help(metrics: PrometheusMetrics) -> None:
    metrics.http("/health", "GET", 200, 0.1)
    metrics.refused("queue_full")
    ours = [family for family in families(metrics, GIVEN) if family.name.startswith("jaxpaged:")]
    assert len(ours) > 50
    for family in ours:
        assert family.documentation.endswith("."), family.name
        assert {sample.labels["model_name"] for sample in family.samples} == {"tiny"}, family.name


def test_a_real_engine_is_told_exactly(metrics: PrometheusMetrics, engine: Engine) -> None:
    prompt = prompt_of(12)
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, n=2)
    for name in ("a", "b"):
        engine.add_request(name, prompt, params)
    for _ in range(6):
        engine.step()
    stats = engine.stats()
    metrics.set_engine(engine.config, engine.memory_report())
    found = samples(metrics, stats)
    for name, attribute, _ in GAUGES:
        assert value(found, name) == getattr(stats, attribute), name
    for name, attribute, _ in COUNTERS:
        assert value(found, f"{name}_total") == getattr(stats, attribute), name
    blocks = {state: value(found, "blocks", state=state) for state in ("free", "cached", "live", "shared")}
    assert blocks["shared"] > 0
    assert blocks["live"] > 0
    assert sum(blocks.values()) == stats.num_blocks
    held = {bucket: value(found, "refcount_hist", holders=bucket) for bucket in holder_buckets({})}
    assert sum(held.values()) == stats.num_blocks - stats.num_free_blocks == blocks["live"] + blocks["shared"]
    assert value(found, "alloc_rate") == stats.blocks_allocated_per_second
    assert value(found, "engine_time_seconds_total", part="device") == stats.device_time
    assert value(found, "cache_config_info", block_size="4", num_blocks=str(stats.num_blocks)) == 1
    report = engine.memory_report()
    assert value(found, "memory_bytes", part="kv_pool") == report.pool
    assert value(found, "kv_mem_used") == (stats.num_blocks - stats.num_free_blocks) * report.block
    assert value(found, "memory_level", level=stats.memory_level) == 1
    for name in ("a", "b"):
        engine.abort_request(name)
    engine.step()


def test_counters_never_go_down_while_an_engine_runs(metrics: PrometheusMetrics) -> None:
    engine = new_engine()
    engine.add_listener(metrics)
    for number in range(6):
        engine.add_request(str(number), prompt_of(9, number), GREEDY)
    before: dict[Key, float] = {}
    num_renders = 0
    while engine.has_unfinished_requests:
        engine.step()
        accept = OPENMETRICS if num_renders % 2 else ""
        found = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families(metrics, engine.stats(), accept)
            if family.type in ("counter", "histogram")
            for sample in family.samples
        }
        for key, old in before.items():
            assert found[key] >= old, key
        before, num_renders = found, num_renders + 1
    engine.close()
    assert num_renders > 10
    assert value(before, "request_success_total", finished_reason="length") == 6
    assert value(before, "e2e_request_latency_seconds_count") == 6
    assert value(before, "request_generation_tokens_sum") == 6 * 16


def test_times_of_a_request_go_where_they_belong(metrics: PrometheusMetrics) -> None:
    metrics.ended(request())
    metrics.ended(request("length", time_per_output_token=None))
    metrics.ended(request("abort", queue_time=None, time_to_first_token=None, time_per_output_token=None))
    metrics.ended(request("a reason of the future"))
    found = samples(metrics, None)
    for name, count, seconds in (
        ("time_to_first_token", 3, 0.3),
        ("request_time_per_output_token", 2, 0.1),
        ("e2e_request_latency", 4, 1.3),
        ("request_queue_time", 3, 0.1),
        ("request_prefill_time", 3, 0.2),
        ("request_decode_time", 3, 1.0),
        ("request_inference_time", 3, 1.2),
    ):
        assert value(found, f"{name}_seconds_count") == count, name
        assert value(found, f"{name}_seconds_sum") == pytest.approx(count * seconds), name
    assert value(found, "request_prompt_tokens_sum") == 80
    assert value(found, "request_generation_tokens_bucket", le="10.0") == 0
    assert value(found, "request_generation_tokens_bucket", le="20.0") == 4
    reasons = {
        reason: value(found, "request_success_total", finished_reason=reason)
        for reason in ("stop", "length", "abort", "error", "timeout", "other")
    }
    assert reasons == {"stop": 1, "length": 1, "abort": 1, "error": 0, "timeout": 0, "other": 1}


def test_steps_and_gaps_count_as_often_as_they_were(metrics: PrometheusMetrics) -> None:
    metrics.stepped(iteration())
    metrics.stepped(iteration(5, num_steps=4, num_scheduled_tokens=12))  # four steps of three tokens in 10 ms
    metrics.gaps({0.012: 30, 0.2: 2})
    metrics.observe_attention(3e-5)
    found = samples(metrics, None)
    assert value(found, "iteration_tokens_total_count") == 5
    assert value(found, "iteration_tokens_total_sum") == 20
    assert value(found, "iteration_tokens_total_bucket", le="4.0") == 4
    assert value(found, "step_time_seconds_sum") == pytest.approx(0.02)
    assert value(found, "inter_token_latency_seconds_bucket", le="0.015") == 30
    assert value(found, "inter_token_latency_seconds_count") == 32
    assert value(found, "inter_token_latency_seconds_sum") == pytest.approx(0.76)
    assert value(found, "attention_latency_seconds_bucket", le="5e-05") == 1
    assert value(found, "attention_latency_seconds_bucket", le="2e-05") == 0


def test_without_stats_what_only_an_engine_knows_is_left_out(metrics: PrometheusMetrics) -> None:
    metrics.http("/metrics", "GET", 200, 0.01)
    with_engine, without = samples(metrics, GIVEN), samples(metrics, None)
    assert "jaxpaged:num_requests_running" in names(with_engine) - names(without)
    assert "jaxpaged:gpu_mem_used" in names(with_engine)
    assert "jaxpaged:gpu_mem_used" not in names(samples(metrics, EngineStats()))
    assert value(without, "http_requests_total", route="/metrics") == 1
    assert value(without, "engine_state", state="starting") == 1


def test_one_state_at_a_time(metrics: PrometheusMetrics) -> None:
    for state in ENGINE_STATES:
        metrics.set_state(state)
        found = samples(metrics, None)
        assert {s for s in ENGINE_STATES if value(found, "engine_state", state=s)} == {state}
    with pytest.raises(ValueError, match=r"state='asleep': must be one of starting, ready"):
        metrics.set_state("asleep")
    assert value(samples(metrics, None), "engine_state", state=ENGINE_STATES[-1]) == 1


def test_an_idle_engine_allocates_nothing(metrics: PrometheusMetrics) -> None:
    stats = EngineStats(blocks_allocated_per_second=12.5)
    metrics.stepped(iteration(time=time.monotonic()))
    assert value(samples(metrics, stats), "alloc_rate") == 12.5
    metrics.stepped(iteration(time=time.monotonic() - 60))
    assert value(samples(metrics, stats), "alloc_rate") == 0


def test_holders_fall_into_buckets_that_double() -> None:
    buckets = holder_buckets({1: 5, 2: 4, 3: 3, 4: 2, 5: 1, 64: 7, 65: 6, 4000: 1})
    assert list(buckets) == ["1", "2", "3-4", "5-8", "9-16", "17-32", "33-64", "65+"]
    assert list(buckets.values()) == [5, 4, 5, 1, 0, 0, 7, 7]


HOSTILE = [
    'quote " end',
    "back\\slash\\",
    "two\nlines",
    "\r\x00\x1b[31m",
    '"} 1\nfake_metric{a="',
    "é漢🙂",
    "\udcff",
]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_hostile_labels_are_escaped(text: str, accept: str) -> None:
    metrics = PrometheusMetrics(text)
    metrics.http(text, "GET", 200, 0.1)
    metrics.refused(text)
    found = families(metrics, GIVEN, accept)
    readable = text.replace("\udcff", "?")
    ours = [sample for family in found for sample in family.samples if sample.name.startswith("jaxpaged:")]
    assert {sample.labels["model_name"] for sample in ours} == {readable}
    assert {sample.labels["route"] for sample in ours if "route" in sample.labels} == {readable}
    plain = families(PrometheusMetrics("m"), GIVEN, accept)
    assert {family.name for family in found} == {family.name for family in plain}


def test_series_are_bounded_whatever_clients_send(metrics: PrometheusMetrics) -> None:
    for number in range(1000):
        metrics.http(f"/{number}", f"METHOD{number}", number, 0.1)
        metrics.refused(f"reason {number}")
    metrics.http("/" + "x" * 100_000, "GET", 200, 0.1)
    found = samples(metrics, None)
    routes = {dict(labels)["route"] for name, labels in found if name == "jaxpaged:http_requests_total"}
    reasons = {dict(labels)["reason"] for name, labels in found if name == "jaxpaged:requests_refused_total"}
    assert len(routes) == MAX_ROUTES + 1
    assert len(reasons) == MAX_REASONS + 1
    assert value(found, "requests_refused_total", reason="other") == 1000 - MAX_REASONS
    methods = {dict(labels)["method"] for name, labels in found if name == "jaxpaged:http_requests_total"}
    assert methods == {"GET", "other"}
    assert sum(v for (name, _), v in found.items() if name == "jaxpaged:http_requests_total") == 1001
    assert (
        sum(v for (n, _), v in found.items() if n == "jaxpaged:http_request_duration_seconds_count") == 1001
    )


def test_http_is_counted(metrics: PrometheusMetrics) -> None:
    metrics.http("/v1/completions", "POST", 200, 0.2)
    metrics.http("/v1/completions", "POST", 429, 0.001)
    metrics.refused("queue_full")
    metrics.disconnected()
    metrics.disconnected()
    found = samples(metrics, None)
    assert value(found, "http_requests_total", route="/v1/completions", method="POST", status="429") == 1
    assert value(found, "http_request_duration_seconds_count", route="/v1/completions") == 2
    assert value(found, "http_request_duration_seconds_sum") == pytest.approx(0.201)
    assert value(found, "requests_refused_total", reason="queue_full") == 1
    assert value(found, "client_disconnects_total") == 2


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain; version=0.0.4", False),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
         "text/plain;version=0.0.4;q=0.5,*/*;q=0.1", True),
        ("application/openmetrics-text;q=0.3, text/plain;q=0.9", False),
        ("application/openmetrics-text;q=0", False),
        ("Application/OpenMetrics-Text ; Q = 0.5", True),
        ("application/openmetrics-text;version=x.y;q=nonsense", False),
        ("application/openmetrics-text;version=x\r\nSet-Cookie: a", True),
        ("application/openmetrics-text;q=nan", False),
        (",;,=;;q=;" * 100, False),
    ],
)  # fmt: skip
def test_the_format_is_the_one_asked_for(metrics: PrometheusMetrics, accept: str, wanted: bool) -> None:
    assert wants_openmetrics(accept) is wanted
    text, content_type = metrics.render(GIVEN, accept)
    assert text.endswith(b"# EOF\n") is wanted
    assert content_type == (
        "application/openmetrics-text; version=1.0.0; charset=utf-8"
        if wanted
        else "text/plain; version=0.0.4; charset=utf-8"
    )


def test_both_formats_say_the_same(metrics: PrometheusMetrics) -> None:
    metrics.ended(request())
    ours = [
        {key: v for key, v in samples(metrics, GIVEN, accept).items() if key[0].startswith("jaxpaged:")}
        for accept in ("", OPENMETRICS)
    ]
    assert ours[0] == ours[1]


def test_engines_of_one_process_share_nothing() -> None:
    one, other = PrometheusMetrics("one"), PrometheusMetrics("other")
    one.ended(request())
    one.http("/health", "GET", 200, 0.1)
    assert value(samples(one, None), "request_success_total", finished_reason="stop") == 1
    assert value(samples(other, None), "request_success_total", finished_reason="stop") == 0
    assert "jaxpaged:http_requests_total" not in names(samples(other, None))
    registered = {family.name for family in prometheus_client.REGISTRY.collect()}
    assert not any(name.startswith("jaxpaged") for name in registered)


def test_rendering_while_threads_count_sees_whole_numbers() -> None:
    metrics = PrometheusMetrics("busy")
    each, stop = 2_000, threading.Event()
    failures: list[BaseException] = []

    def hammer(number: int) -> None:
        try:
            for i in range(each):
                metrics.http(f"/{i % 100}", "POST", 200 + i % 3, 0.01)
                metrics.refused(f"reason {i % 40}")
                metrics.observe_attention(1e-4)
                if number == 0:  # the engine's thread
                    metrics.stepped(iteration(i))
                    metrics.gaps({0.01: 3})
                    metrics.ended(request())
        except BaseException as error:
            failures.append(error)

    def render() -> None:
        try:
            while not stop.is_set():
                found = samples(metrics, GIVEN)
                largest = value(found, "inter_token_latency_seconds_bucket", le="+Inf")
                assert largest == value(found, "inter_token_latency_seconds_count")
                assert value(found, "inter_token_latency_seconds_sum") == pytest.approx(0.01 * largest)
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=hammer, args=(number,)) for number in range(3)]
    reader = threading.Thread(target=render)
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join(60)
    stop.set()
    reader.join(60)
    assert failures == []
    found = samples(metrics, None)
    assert sum(v for (name, _), v in found.items() if name == "jaxpaged:http_requests_total") == 3 * each
    assert value(found, "attention_latency_seconds_count") == 3 * each
    assert value(found, "inter_token_latency_seconds_count") == 3 * each
    metrics.check_invariants()


def _seconds_each(call: Callable[[], None], repeats: int = 2_000) -> float:
    best = float("inf")
    for _ in range(3):
        begun = time.process_time()
        for _ in range(repeats):
            call()
        best = min(best, (time.process_time() - begun) / repeats)
    return best


def test_the_engine_hardly_notices(metrics: PrometheusMetrics) -> None:
    step, gaps, end = iteration(), {0.01: 60}, request()
    # About 1, 0.5 and 4 microseconds; the bounds are for machines that are slow or busy.
    assert _seconds_each(lambda: metrics.stepped(step)) < 25e-6
    assert _seconds_each(lambda: metrics.gaps(gaps)) < 10e-6
    assert _seconds_each(lambda: metrics.ended(end)) < 75e-6
    assert {name for name, _, _ in HISTOGRAMS} == set(metrics._histograms)
