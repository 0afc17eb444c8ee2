"""What of the Ray Serve application works without Ray: its options, how requests travel, metrics, scaling."""

import asyncio
import pickle
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Message, Receive, Scope, Send

from jaxpaged.serve.ray_app.autoscaling import SEQUENCES, wanted_replicas
from jaxpaged.serve.ray_app.forwarding import ForwardedRequest, Head, Responder
from jaxpaged.serve.ray_app.merged_metrics import merge_metrics
from jaxpaged.serve.ray_app.options import Arguments, RayOptions
from jaxpaged.serve.ray_app.refusals import RefusalCounter
from jaxpaged.serve.server.guard_options import guard_options, without_access_checks
from jaxpaged.serve.server.guards.access import RequestSummary
from jaxpaged.serve.server.options import ServerOptions
from tests.serve.asynchronous import asynchronous, until

# Options.


def test_text_becomes_what_an_option_is() -> None:
    given = {
        "max_num_seqs": "8",
        "deterministic": "true",
        "served_model_name": "tiny",
        "drain_timeout": "2.5",
    }
    parsed = Arguments.parse(given | {"num_replicas": "3", "num_gpus": "0.5", "api_key": ["a", "b"]})
    assert parsed.engine.max_num_seqs == 8
    assert parsed.engine.deterministic is True
    assert parsed.server.served_model_name == ["tiny"]
    assert parsed.server.drain_timeout == 2.5
    assert parsed.server.api_key == ["a", "b"]
    assert (parsed.ray.num_replicas, parsed.ray.num_gpus) == (3, 0.5)


def test_defaults_are_those_of_the_server_but_for_the_page() -> None:
    parsed = Arguments.parse({})
    assert parsed.server == ServerOptions(no_page=True)
    assert parsed.ray == RayOptions()
    assert Arguments.parse({"no_page": "false"}).server.page


def test_model_is_found_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Arguments.parse({"model": "model"}).engine.model == tmp_path / "model"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"modle": "x", "num_gpu": 1}, "unknown options: modle, num_gpu"),
        ({"port": 80}, "port=80: is for Ray's proxies"),
        ({"max_num_seqs": "many"}, "max_num_seqs='many'"),
        ({"num_replicas": 0}, "num_replicas=0: must be at least 1"),
        ({"num_replicas": 3, "max_replicas": 2}, "max_replicas=2: must be at least 3"),
        ({"load_factor": 0.5}, "load_factor=0.5: must be at least 1"),
        ({"num_gpus": -1}, "num_gpus=-1.0: must be at least 0"),
        ({"replica_wait": 0}, "replica_wait=0.0: must be positive"),
        ({"max_n": 0}, "max_n=0: must be at least 1"),
    ],
)
def test_wrong_options_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        Arguments.parse(given)


def test_what_depends_on_the_batch() -> None:
    assert Arguments.parse({}).max_num_seqs(0) == 64
    assert Arguments.parse({}).max_num_seqs(1) == 256
    assert Arguments.parse({"max_num_batched_tokens": 32}).max_num_seqs(1) == 32
    assert RayOptions().load_bound(64).allowance == 16
    assert RayOptions(load_allowance=3).load_bound(64).allowance == 3
    assert RayOptions().target(64) == 48
    assert RayOptions(target_sequences=5).target(64) == 5
    assert RayOptions(max_replicas=4, num_replicas=0).num_replicas == 0


# Requests on their way.


def request(body: bytes = b"", **scope: Any) -> ForwardedRequest:
    full = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], **scope}
    state = {"request_id": "req-1", "tenant": "key-2", "other": object()}
    return ForwardedRequest.of({**full, "state": state, "app": object()}, body)


def test_request_can_be_sent_to_another_process() -> None:
    headers = [(b"x-request-id", b"the client's, \xff"), (b"accept", b"*/*")]
    sent = pickle.loads(pickle.dumps(request(b"body", headers=headers, client=("::1", 5))))
    assert sent.scope["headers"] == [(b"accept", b"*/*"), (b"x-request-id", b"req-1")]
    assert sent.request_id == "req-1"
    assert sent.tenant == "key-2"
    assert sent.scope["client"] == ("::1", 5)
    assert sent.body == b"body"


def test_path_is_without_the_prefix_of_the_application() -> None:
    assert request(path="/health").path == "/health"
    assert request(path="/llm/health", root_path="/llm").path == "/health"
    assert request(path="/health", root_path="/").path == "/health"


class App:
    """Answers with what it is told to, and keeps what it receives."""

    def __init__(self, *messages: Message, waits: bool = False, error: Exception | None = None) -> None:
        self.messages, self.waits, self.error = messages, waits, error
        self.received: list[Message] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.state = scope["state"]
        self.received.append(await receive())
        for message in self.messages:
            await send(message)
        if self.waits:
            self.received.append(await receive())
        if self.error is not None:
            raise self.error


START: Message = {"type": "http.response.start", "status": 201, "headers": [(b"a", b"b")]}
BODY = "http.response.body"


async def parts_of(app: App) -> list[Any]:
    return [part async for part in Responder(app).respond(request(b"in"))]


@asynchronous
async def test_answer_is_its_head_and_its_body() -> None:
    app = App(START, {"type": BODY, "body": b"one", "more_body": True}, {"type": BODY, "body": b"two"})
    head, *body = await parts_of(app)
    assert head == Head(201, [(b"a", b"b")])
    assert b"".join(body) == b"onetwo"
    assert app.received == [{"type": "http.request", "body": b"in", "more_body": False}]
    assert app.state == {"tenant": "key-2"}, "what the guards found out"


@asynchronous
async def test_answer_without_a_body_ends() -> None:
    assert await parts_of(App(START, {"type": BODY})) == [Head(201, [(b"a", b"b")])]


@asynchronous
async def test_pieces_come_as_they_are_sent() -> None:
    app = App(START, {"type": BODY, "body": b"first", "more_body": True}, waits=True)
    parts = Responder(app).respond(request())
    arrived = [await anext(parts), await anext(parts)]
    assert arrived == [Head(201, [(b"a", b"b")]), b"first"]
    await parts.aclose()
    await until(lambda: len(app.received) == 2)
    assert app.received[-1] == {"type": "http.disconnect"}, "a reader that leaves is told"


@asynchronous
async def test_waiting_reader_can_be_cancelled() -> None:
    app = App(START, waits=True)
    task = asyncio.create_task(parts_of(app))
    await until(lambda: app.received)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: len(app.received) == 2)
    assert app.received[-1] == {"type": "http.disconnect"}


@asynchronous
async def test_failure_before_the_end_is_raised_and_one_after_it_is_not() -> None:
    broken = App(START, {"type": BODY, "body": b"half", "more_body": True}, error=OSError("gone"))
    with pytest.raises(RuntimeError, match="ended before its answer") as raised:
        await parts_of(broken)
    assert isinstance(raised.value.__cause__, OSError)
    whole = App(START, {"type": BODY, "body": b"all"}, error=OSError("gone"))
    assert (await parts_of(whole))[1:] == [b"all"]


@asynchronous
async def test_answers_of_one_application_do_not_mix() -> None:
    async def echo(scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        await send(START)
        for _ in range(20):
            await asyncio.sleep(0)
            await send({"type": BODY, "body": body, "more_body": True})
        await send({"type": BODY})

    async def collect(parts: AsyncGenerator[Any]) -> bytes:
        return b"".join([part async for part in parts if isinstance(part, bytes)])

    responder = Responder(echo)
    bodies = [b"%d," % i for i in range(10)]
    answers = await asyncio.gather(*(collect(responder.respond(request(body))) for body in bodies))
    assert answers == [body * 20 for body in bodies]


# Metrics.

ONE = """\
# HELP requests_total Requests.
# TYPE requests_total counter
requests_total{route="/a",status="200"} 3.0
# HELP free_blocks Free.
# TYPE free_blocks gauge
free_blocks 5.0
# EOF
"""
OTHER = """\
# HELP requests_total Requests.
# TYPE requests_total counter
requests_total{route="a b{},\\"",status="500"} 1.0
# HELP seconds Seconds.
# TYPE seconds histogram
seconds_bucket{le="+Inf"} 2.0
seconds_count{} 2.0
seconds_sum{} 0.5
"""


def test_every_sample_says_whose_it_is() -> None:
    merged = merge_metrics({"r1": ONE, "r2": OTHER})
    families = {family.name: family for family in text_string_to_metric_families(merged)}
    assert {name: family.type for name, family in families.items()} == {
        "requests": "counter",
        "free_blocks": "gauge",
        "seconds": "histogram",
    }
    samples = {
        (sample.name, sample.labels["replica"]): (sample.labels, sample.value)
        for family in families.values()
        for sample in family.samples
    }
    assert samples["requests_total", "r1"] == ({"replica": "r1", "route": "/a", "status": "200"}, 3)
    assert samples["requests_total", "r2"][0]["route"] == 'a b{},"'
    assert samples["free_blocks", "r1"] == ({"replica": "r1"}, 5)
    assert samples["seconds_sum", "r2"] == ({"replica": "r2"}, 0.5)
    assert len(samples) == 6
    assert merged.count("# TYPE requests_total ") == 1
    assert merge_metrics({}) == ""


def summary(**details: Any) -> RequestSummary:
    return RequestSummary("POST", "unmatched", 401, 0.1, "127.0.0.1", "req-1", False, details)


def test_ingress_counts_and_logs_only_what_it_refused(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    counter = RefusalCounter("tiny", "ingress-1", ServerOptions(access_log=str(path)))
    counter.ended(summary())
    counter.ended(summary(forwarded=True))
    line = 'jaxpaged:http_requests_total{method="POST",model_name="tiny",route="unmatched",status="401"} 1.0'
    assert line in counter.render().splitlines()
    counter.close()
    [logged] = path.read_text().splitlines()
    assert '"status":401' in logged.replace(" ", "")


def test_guards_of_the_ingress_are_those_of_the_server(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("filed\n")
    options = ServerOptions(
        api_key=["given"], api_key_file=tmp_path / "keys", host="0.0.0.0", max_body_bytes=9
    )
    guards = guard_options(options)
    assert guards.api_keys == ("given", "filed")
    assert guards.bind_host == "0.0.0.0"
    assert guards.max_body_bytes == 9
    assert "/" in guards.public_paths
    inner = without_access_checks(guards)
    assert (inner.api_keys, inner.allowed_origins, inner.allowed_hosts) == ((), (), ("*",))
    assert inner.max_body_bytes == 9
    assert guard_options(ServerOptions(no_page=True)).public_paths == ("/health",)


# Scaling.


def context(reported: dict[str, float], *, queued: float, counted: float, target: float) -> SimpleNamespace:
    config = SimpleNamespace(target_ongoing_requests=target)
    metrics = {SEQUENCES: reported} if reported else {}
    return SimpleNamespace(
        aggregated_metrics=metrics, total_queued_requests=queued, total_num_requests=counted, config=config
    )


@pytest.mark.parametrize(
    ("reported", "queued", "counted", "wanted"),
    [
        ({}, 0, 0, 0),
        ({"a": 48.0}, 0, 48, 1),
        ({"a": 96.0, "b": 48.0}, 0, 20, 3),  # a few requests with many sequences each
        ({"a": 24.0}, 24, 48, 1),  # those that look for a replica count
        ({}, 0, 96, 2),  # replicas that have not reported yet
    ],
)
def test_replicas_follow_sequences(
    reported: dict[str, float], queued: float, counted: float, wanted: float
) -> None:
    assert wanted_replicas(context(reported, queued=queued, counted=counted, target=48)) == (wanted, {})
