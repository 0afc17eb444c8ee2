"""The ingress before replicas that answer, fail, die or are not there; no cluster is needed."""

import importlib.util
import json
import warnings
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from jaxpaged.serve.prefix_routing import body_keys
from jaxpaged.serve.ray_app.forwarding import Head
from jaxpaged.serve.server.options import ServerOptions
from tests.serve.asynchronous import asynchronous
from tests.serve.ray_doubles import Handle, Parts

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs Ray: pip install 'jaxpaged[ray]'", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own, about pydantic
    from ray.exceptions import RayActorError, RayTaskError
    from ray.serve.exceptions import DeploymentUnavailableError

    from jaxpaged.serve.ray_app import ingress as ingress_module
    from jaxpaged.serve.ray_app.ingress import Ingress

JSON = [(b"content-type", b"application/json")]
LOST = RayActorError()
BODY = {"prompt": "p" * 300, "stream": False}
PATH = "/v1/completions"


def answer(replica: str, body: bytes = b"{}", status: int = 200) -> Parts:
    return Parts(replica, Head(status, JSON), body)


async def ask(
    monkeypatch: pytest.MonkeyPatch,
    handle: Handle,
    method: str = "POST",
    path: str = PATH,
    *,
    options: ServerOptions | None = None,
    **request: Any,
) -> httpx.Response:
    """What an ingress before ``handle`` answers."""
    context = SimpleNamespace(replica_tag="i1")
    monkeypatch.setattr(ingress_module.serve, "get_replica_context", lambda: context)
    options = options or ServerOptions(no_page=True)
    ingress = Ingress(handle, options, ["tiny"], replica_wait=0.05)
    transport = httpx.ASGITransport(ingress.run)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.request(method, path, **request)


@asynchronous
async def test_request_goes_with_its_keys_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Handle([answer("r1", b'{"a":1}')])
    response = await ask(monkeypatch, handle, json=BODY)
    assert (response.status_code, response.json()) == (200, {"a": 1})
    assert response.headers["x-jaxpaged-replica"] == "r1"
    assert "x-request-id" not in response.headers, "Ray's proxy adds it"
    [call] = handle.calls
    assert json.loads(call["request"].body) == BODY
    assert call["keys"] == body_keys(call["request"].body) != ()
    assert call["avoid"] == ()


@pytest.mark.parametrize(
    "first",
    [Parts(LOST), Parts("r1", LOST), Parts("r1", Head(200, JSON), b"half", LOST), answer("r1", status=503)],
)
@asynchronous
async def test_replica_that_has_not_answered_is_replaced_by_another(
    monkeypatch: pytest.MonkeyPatch, first: Parts
) -> None:
    handle = Handle([first, answer("r2", b'{"whole":1}')])
    response = await ask(monkeypatch, handle, json=BODY)
    assert response.json() == {"whole": 1}
    assert response.headers["x-jaxpaged-replica"] == "r2"
    assert handle.calls[1]["avoid"] in ((), ("r1",))
    assert handle.calls[0]["keys"] == handle.calls[1]["keys"]


@asynchronous
async def test_last_refusal_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Handle([answer(f"r{i}", b'{"error": "engine_dead"}', 503) for i in range(3)])
    response = await ask(monkeypatch, handle, json=BODY)
    assert (response.status_code, response.json()) == (503, {"error": "engine_dead"})
    assert [call["avoid"] for call in handle.calls] == [(), ("r0",), ("r0", "r1")]


@pytest.mark.parametrize("status", [400, 404, 429, 500, 504])
@asynchronous
async def test_other_errors_are_answers(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    handle = Handle([answer("r1", b'{"error": {}}', status)])
    response = await ask(monkeypatch, handle, json=BODY)
    assert (response.status_code, len(handle.calls)) == (status, 1)


@pytest.mark.parametrize("answers", [[Parts(None)], [Parts(LOST), Parts(LOST), Parts(LOST)]])
@asynchronous
async def test_without_a_replica_the_client_is_told_when_to_come_back(
    monkeypatch: pytest.MonkeyPatch, answers: list[Parts]
) -> None:
    response = await ask(monkeypatch, Handle(answers), json=BODY)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_not_ready"
    assert int(response.headers["retry-after"]) > 0


@asynchronous
async def test_health_without_a_replica_is_that_of_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress_module, "HEALTH_WAIT", 0.01)
    parts = Parts(None)
    response = await ask(monkeypatch, Handle([parts]), "GET", "/health")
    assert (response.status_code, response.json()) == (503, {"status": "starting"})
    assert parts.cancelled, "nobody waits for it any more"


@asynchronous
async def test_failure_inside_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Parts("r1", RayTaskError("respond", "a secret traceback", ValueError("inside")))
    handle = Handle([failed])
    response = await ask(monkeypatch, handle, json=BODY)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "request_failed"
    assert "secret" not in response.text
    assert len(handle.calls) == 1


@asynchronous
async def test_what_the_guards_refuse_goes_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ServerOptions(api_key=["a", "b"], no_page=True, max_body_bytes=1000)
    handle = Handle([answer("r1")])
    known = {"Authorization": "Bearer b"}
    refused = [
        await ask(monkeypatch, handle, options=options, json=BODY),
        await ask(monkeypatch, handle, options=options, json={"prompt": "p" * 2000}, headers=known),
        await ask(monkeypatch, handle, options=options, json=BODY, headers=known | {"Host": "evil.example"}),
    ]
    assert [response.status_code for response in refused] == [401, 413, 403]
    assert handle.calls == []
    response = await ask(monkeypatch, handle, options=options, json=BODY, headers=known)
    assert response.status_code == 200
    [call] = handle.calls
    assert call["request"].tenant == "key-2"
    assert call["keys"] == body_keys(call["request"].body, "key-2")


@asynchronous
async def test_only_prompts_have_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for method, path in (("GET", "/v1/models"), ("POST", "/tokenize")):
        handle = Handle([answer("r1")])
        await ask(monkeypatch, handle, method, path, json=BODY)
        assert handle.calls[0]["keys"] == (), path


@asynchronous
async def test_metrics_are_collected_from_whoever_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    replicas = [("r1", Head(200, []), b"free 1.0\n"), LOST, ("r3", Head(200, []), b"free 3.0\n")]
    handle = Handle(whole=replicas)
    response = await ask(
        monkeypatch, handle, "GET", "/metrics", headers={"Accept": "application/openmetrics-text"}
    )
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = response.text.splitlines()
    assert 'free{replica="r1"} 1.0' in samples
    assert 'free{replica="r3"} 3.0' in samples
    assert any('replica="ingress-i1"' in line for line in samples)
    assert b"accept" not in dict(handle.calls[0]["request"].scope["headers"]), (
        "one format, which can be merged"
    )


@asynchronous
async def test_metrics_without_replicas_are_those_of_the_ingress(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = DeploymentUnavailableError(SimpleNamespace(name="Replica", app_name="jaxpaged"))
    response = await ask(monkeypatch, Handle(whole=gone), "GET", "/metrics")
    assert response.status_code == 200
    assert 'replica="ingress-i1"' in response.text
