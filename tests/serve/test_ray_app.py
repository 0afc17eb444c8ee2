"""Two replicas on a Ray cluster of this machine: what they answer, who answers, and that one may die."""

import importlib.util
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxpaged import Engine, SamplingParams
from tests.serve.ray_cluster import RayCluster, ray_cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'jaxpaged[ray]'"
    ),
]

SIZES = {"num_blocks": 120, "max_num_seqs": 4, "max_num_batched_tokens": 32, "block_size": 8}
SIZES |= {"max_model_len": 512, "num_scheduler_steps": 1}
KEY, OTHER_KEY = "the-key-of-the-test", "the-key-of-another-tenant"
MODEL = "tiny"
TOKENS = 12
DEADLINE = 120.0
PROMPTS = ["the cat", "", "a dog and a cat", *(f"number {i} of them" for i in range(5))]


@dataclass
class Cluster:
    """The application and a client of it."""

    process: RayCluster
    client: httpx.Client
    offline: dict[str, str]

    @property
    def url(self) -> str:
        return str(self.client.base_url).rstrip("/")

    def complete(self, prompt: str, **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        return self.client.post("/v1/completions", json=body | fields)

    def stream(self, prompt: str, **fields: Any) -> tuple[list[dict[str, Any]], str]:
        """The events of a stream, [DONE] left out, and who sent them."""
        body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
        with self.client.stream("POST", "/v1/completions", json=body | fields) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in response.iter_lines() if line and not line.startswith(":")]
        assert lines[-1] == "data: [DONE]"
        events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        return events, response.headers["x-jaxpaged-replica"]

    def samples(self, name: str, **labels: str) -> dict[str, float]:
        """Values of a metric by replica."""
        response = self.client.get("/metrics")
        assert response.status_code == 200
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(response.text):
            for sample in family.samples:
                if sample.name == f"jaxpaged:{name}" and labels.items() <= sample.labels.items():
                    replica = sample.labels["replica"]
                    found[replica] = found.get(replica, 0) + sample.value
        return found

    def replicas(self) -> set[str]:
        """Names of the replicas that are ready."""
        return {name for name, value in self.samples("engine_state", state="ready").items() if value == 1}


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def offline(checkpoint: Path) -> dict[str, str]:
    """What an engine in this process says."""
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    with Engine(checkpoint, **SIZES) as engine:
        outputs = engine.generate(PROMPTS[:1] + PROMPTS[2:], params)
    return {output.prompt: output.outputs[0].text for output in outputs}


@pytest.fixture(scope="module")
def cluster(
    checkpoint: Path, offline: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    port = free_port()
    with ray_cluster(
        tmp_path_factory.mktemp("ray") / "log",
        port=port,
        model=checkpoint,
        served_model_name=MODEL,
        num_replicas=2,
        api_key=[KEY, OTHER_KEY],
        allowed_origin="https://example.org",
        max_body_bytes=100_000,
        drain_timeout=5,
        health_period=1,
        **SIZES,
    ) as process:
        headers = {"Authorization": f"Bearer {KEY}"}
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, headers=headers, timeout=DEADLINE) as client:
            yield Cluster(process, client, offline)


def test_answers_are_those_of_the_engine(cluster: Cluster) -> None:
    assert cluster.client.get("/health").json() == {"status": "ready"}
    assert cluster.client.get("/v1/models").json()["data"][0]["id"] == MODEL
    for prompt, text in cluster.offline.items():
        whole = cluster.complete(prompt)
        assert whole.status_code == 200, whole.text
        assert whole.json()["choices"][0]["text"] == text
        events, _ = cluster.stream(prompt, stream_options={"include_usage": True})
        assert "".join(c["text"] for event in events for c in event["choices"]) == text
        assert len(events) > 2, "streamed in pieces"
        assert events[-1]["usage"]["completion_tokens"] == TOKENS


def test_errors_come_through(cluster: Cluster) -> None:
    def error(response: httpx.Response, status: int) -> dict[str, Any]:
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/json"
        assert len(response.headers.get_list("x-request-id")) == 1
        body: dict[str, Any] = response.json()["error"]
        assert set(body) == {"message", "type", "param", "code"}
        return body

    # From a replica.
    assert error(cluster.complete("x", max_tokens=-1), 400)["param"] == "max_tokens"
    assert error(cluster.complete("x" * 2000), 400)["code"] == "context_length_exceeded"
    assert error(cluster.complete("x", model="other"), 404)["code"] == "model_not_found"
    assert error(cluster.client.get("/nothing"), 404)["type"] == "not_found_error"
    assert error(cluster.client.get("/v1/completions"), 405)
    # From the ingress.
    nobody = httpx.post(f"{cluster.url}/v1/completions", json={"prompt": "x"})
    assert error(nobody, 401)["code"] == "invalid_api_key"
    assert error(cluster.complete("x" * 200_000), 413)
    assert error(cluster.client.post("/v1/completions", content="{}"), 415)
    origin = {"Origin": "https://example.org"}
    allowed = cluster.client.get("/v1/models", headers=origin).headers.get_list("access-control-allow-origin")
    assert allowed == ["https://example.org"]
    asked = {"X-Request-Id": "mine-1"}
    assert cluster.client.get("/v1/models", headers=asked).headers.get_list("x-request-id") == ["mine-1"]


def test_keys_of_the_ingress_are_tenants_of_the_replicas(cluster: Cluster) -> None:
    def cached(key: str) -> int:
        body = {"prompt": "what one tenant has asked", "max_tokens": 1}
        headers = {"Authorization": f"Bearer {key}"}
        response = cluster.client.post("/v1/completions", json=body, headers=headers)
        number: int = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return number

    assert cached(KEY) == 0
    assert cached(KEY) > 0
    assert cached(OTHER_KEY) == 0
    schema = cluster.client.get("/openapi.json").json()
    assert schema["components"]["securitySchemes"], "the replicas say what the ingress asks for"


def test_same_beginning_goes_to_the_same_replica(cluster: Cluster) -> None:
    chosen: dict[str, set[str]] = {}
    for number in range(24):
        beginning = f"rule {number % 8} " * 45  # longer than the shortest that decides
        response = cluster.complete(f"{beginning} and then {number}", max_tokens=1)
        assert response.status_code == 200, response.text
        chosen.setdefault(beginning, set()).add(response.headers["x-jaxpaged-replica"])
    assert all(len(replicas) == 1 for replicas in chosen.values()), chosen
    assert {name for names in chosen.values() for name in names} == cluster.replicas()


def test_one_beginning_for_all_uses_all_replicas_when_there_is_much_of_it(cluster: Cluster) -> None:
    with ThreadPoolExecutor(12) as pool:
        prompts = ["all the same " * 25 + str(i) for i in range(12)]
        answers = list(pool.map(lambda prompt: cluster.complete(prompt, max_tokens=60), prompts))
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.headers["x-jaxpaged-replica"] for answer in answers} == cluster.replicas()


def test_metrics_are_those_of_all_replicas(cluster: Cluster) -> None:
    replicas = cluster.replicas()
    assert len(replicas) == 2
    generated = cluster.samples("generation_tokens_total")
    assert set(generated) == replicas
    assert all(value > 0 for value in generated.values())
    refused = cluster.samples("http_requests_total", status="401")
    assert httpx.get(f"{cluster.url}/metrics").status_code == 401
    refused_now = cluster.samples("http_requests_total", status="401")
    assert sum(refused_now.values()) == sum(refused.values()) + 1


def test_client_that_leaves_frees_its_blocks(cluster: Cluster) -> None:
    aborted = sum(cluster.samples("request_success_total", finished_reason="abort").values())
    body = {"prompt": "the cat", "max_tokens": 240, "ignore_eos": True, "stream": True}
    with cluster.client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    wait_for(
        lambda: sum(cluster.samples("request_success_total", finished_reason="abort").values()) == aborted + 1
    )
    assert set(cluster.samples("num_requests_running").values()) == {0}


def test_replica_that_is_killed_is_replaced_and_costs_no_answer(cluster: Cluster) -> None:
    before = cluster.replicas()
    prompts = [prompt for prompt in cluster.offline for _ in range(4)]

    def stream(prompt: str) -> str:
        """The text, or the code of the error that ended it."""
        events, _ = cluster.stream(prompt)
        if "error" in events[-1]:
            return str(events[-1]["error"]["code"])
        return "".join(choice["text"] for event in events for choice in event["choices"])

    long = {"prompt": "the cat", "max_tokens": 480, "ignore_eos": True, "stream": True}
    with ThreadPoolExecutor(8) as pool, cluster.client.stream("POST", "/v1/completions", json=long) as begun:
        lines = begun.iter_lines()
        assert "text" in next(lines)
        victim = begun.headers["x-jaxpaged-replica"]
        futures = [(pool.submit(cluster.complete, p), pool.submit(stream, p)) for p in prompts]
        wait_for(lambda: futures[0][0].done())
        cluster.process.kill(victim)
        answers = [(whole.result(), streamed.result()) for whole, streamed in futures]
        ended = [line for line in lines if line]
    assert json.loads(ended[-2].removeprefix("data: "))["error"]["code"] == "replica_lost"
    assert ended[-1] == "data: [DONE]"
    for prompt, (whole, text) in zip(prompts, answers, strict=True):
        assert whole.status_code == 200, whole.text
        assert whole.json()["choices"][0]["text"] == cluster.offline[prompt]
        assert text in (cluster.offline[prompt], "replica_lost")
    wait_for(lambda: len(cluster.replicas()) == 2)
    assert victim in before - cluster.replicas()
    assert cluster.complete(prompts[0]).json()["choices"][0]["text"] == cluster.offline[prompts[0]]
