"""What the Ray Serve application does with Ray's objects, without a cluster: routing, relaying, health, deployment."""

import asyncio
import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import Message

from jaxpaged.serve.engine_errors import EngineDeadError
from jaxpaged.serve.engine_state import EngineState
from jaxpaged.serve.prefix_routing import LoadBound, prefix_keys, rendezvous_order
from jaxpaged.serve.ray_app.forwarding import Head
from jaxpaged.serve.server.options import ServerOptions
from tests.serve.asynchronous import asynchronous
from tests.serve.ray_doubles import Parts

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs Ray: pip install 'jaxpaged[ray]'", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own, about pydantic
    from ray.exceptions import RayActorError, RayTaskError
    from ray.serve.request_router import ReplicaID

    from jaxpaged.serve.ray_app import build_app
    from jaxpaged.serve.ray_app.replica import Replica, options_of_replica
    from jaxpaged.serve.ray_app.replica_answer import ReplicaAnswer, ReplicaFailedError, ReplicaLostError
    from jaxpaged.serve.ray_app.request_router import PrefixRouter

NAMES = ("r1", "r2", "r3")
KEYS = prefix_keys(b"a prompt")
FAVOURITE, SECOND, THIRD = rendezvous_order(KEYS[0], NAMES)


class Router(PrefixRouter):
    """One that Ray has not set up: without its metrics and its probes."""

    def __init__(self, cached: Mapping[str, int] | None = None, **bound: Any) -> None:
        cached = cached or {}
        self._replica_queue_len_cache = SimpleNamespace(get=lambda replica: cached.get(replica.unique_id))
        self._use_replica_queue_len_cache = False
        self.initialize_state(**bound)

    def chosen(self, **call: Any) -> list[str]:
        replicas = [SimpleNamespace(replica_id=replica_id(name)) for name in NAMES]
        context = SimpleNamespace(should_backoff=False)
        pending = SimpleNamespace(kwargs=call, routing_context=context)
        ranks = asyncio.run(self.choose_replicas(replicas, pending))
        assert context.should_backoff, "a full cluster must not be asked without a pause"
        assert all(len(rank) == 1 for rank in ranks)
        return [rank[0].replica_id.unique_id for rank in ranks]


def replica_id(name: str) -> ReplicaID:
    return ReplicaID(unique_id=name, deployment_id=SimpleNamespace(name="Replica", app_name="jaxpaged"))


def test_router_ranks_by_beginning_and_load() -> None:
    router = Router(factor=1.25, allowance=2)
    assert router.bound == LoadBound(factor=1.25, allowance=2)
    assert router.chosen(keys=KEYS) == [FAVOURITE, SECOND, THIRD]
    for _ in range(2):
        router.on_send_request(replica_id(FAVOURITE))
    assert router.chosen(keys=KEYS) == [SECOND, THIRD, FAVOURITE]
    assert router.chosen() == [*sorted((SECOND, THIRD)), FAVOURITE]
    router.on_request_completed(replica_id(FAVOURITE), "any")
    assert router.chosen(keys=KEYS)[0] == FAVOURITE


def test_router_counts_what_other_ingresses_sent() -> None:
    router = Router({FAVOURITE: 9}, allowance=2)
    assert router.chosen(keys=KEYS)[0] == SECOND


def test_router_tries_last_what_has_failed() -> None:
    assert Router().chosen(keys=KEYS, avoid=(FAVOURITE,)) == [SECOND, THIRD, FAVOURITE]


def test_router_forgets_replicas_that_are_gone() -> None:
    router = Router()
    router.on_send_request(replica_id("gone"))
    for _ in range(3):  # Ray may tell of an end twice
        router.on_request_completed(replica_id("gone"), "any")
    assert dict(router.num_under_way) == {}


# Answers.


STREAM = Head(200, [(b"content-type", b"text/event-stream; charset=utf-8")])
PLAIN = Head(200, [(b"content-type", b"application/json")])
LOST = RayActorError()
FAILED = RayTaskError("respond", "traceback", ValueError("wrong"))


async def sent(*parts: Any, wait: float = 60.0) -> tuple[list[Message], bool]:
    """What goes to the client, and whether the rest was cancelled."""
    source = Parts(*parts)
    answer = ReplicaAnswer(source)
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    try:
        await answer.begin(wait)
        await answer.send_to(send)
    finally:
        answer.close()
    return messages, source.cancelled


@asynchronous
async def test_stream_is_passed_through() -> None:
    messages, cancelled = await sent("r1", STREAM, b"data: 1\n\n", b"data: 2\n\n")
    assert messages[0]["headers"] == [*STREAM.headers, (b"x-jaxpaged-replica", b"r1")]
    assert [message.get("body") for message in messages[1:]] == [b"data: 1\n\n", b"data: 2\n\n", b""]
    assert [message["more_body"] for message in messages[1:]] == [True, True, False]
    assert not cancelled


@asynchronous
async def test_what_is_no_stream_is_sent_whole() -> None:
    messages, cancelled = await sent("r1", PLAIN, b'{"a":', b"1}")
    assert messages[1:] == [{"type": "http.response.body", "body": b'{"a":1}', "more_body": False}]
    assert not cancelled


@pytest.mark.parametrize(("error", "code"), [(LOST, b"replica_lost"), (FAILED, b"request_failed")])
@asynchronous
async def test_stream_that_breaks_off_says_so(error: Exception, code: bytes) -> None:
    messages, _ = await sent("r1", STREAM, b"data: 1\n\n", error)
    assert messages[1]["body"] == b"data: 1\n\n"
    assert b'"code": "' + code + b'"' in messages[2]["body"]
    assert messages[2]["body"].endswith(b"data: [DONE]\n\n")
    assert messages[2]["more_body"] is False


@pytest.mark.parametrize("begun", [(), ("r1",), ("r1", STREAM), ("r1", PLAIN, b"half")])
@pytest.mark.parametrize(("error", "kind"), [(LOST, ReplicaLostError), (FAILED, ReplicaFailedError)])
@asynchronous
async def test_failure_before_anything_was_sent_is_told(
    begun: tuple[Any, ...], error: Exception, kind: type[Exception]
) -> None:
    if begun == ("r1", STREAM):
        messages, _ = await sent(*begun, error)
        assert len(messages) == 2, "the head of a stream is sent before its first event"
    else:
        with pytest.raises(kind):
            await sent(*begun, error)


@asynchronous
async def test_only_the_replica_is_waited_for_with_a_limit() -> None:
    parts = Parts(None)
    answer = ReplicaAnswer(parts)
    with pytest.raises(TimeoutError):
        await answer.begin(0.01)
    answer.close()
    assert parts.cancelled


# Replicas.


def test_replica_is_healthy_until_its_engine_dies() -> None:
    def replica(state: EngineState, error: Exception | None = None) -> Any:
        return SimpleNamespace(_engine=SimpleNamespace(state=state, error=error, num_unfinished=7))

    Replica.check_health(replica(EngineState.READY))
    assert Replica.record_autoscaling_stats(replica(EngineState.READY)) == {"sequences": 7}
    error = RuntimeError("device lost")
    with pytest.raises(EngineDeadError, match="dead") as raised:
        Replica.check_health(replica(EngineState.DEAD, error))
    assert raised.value.__cause__ is error


def test_replicas_have_no_keys_and_boards_of_their_own(tmp_path: Path) -> None:
    options = ServerOptions(api_key=["secret"], api_key_file=tmp_path, tensorboard=tmp_path)
    inner = options_of_replica(options, "r1")
    assert inner.api_key
    assert "secret" not in inner.api_key
    assert inner.api_key_file is None
    assert inner.tensorboard == tmp_path / "r1"
    assert options_of_replica(ServerOptions(), "r1") == ServerOptions()


def test_application_has_what_it_was_told() -> None:
    options = {
        "max_num_seqs": 8,
        "max_queue_length": 100,
        "drain_timeout": 20,
        "num_gpus": 1,
        "max_replicas": 5,
    }
    ingress = build_app(options | {"num_ingresses": 2})._bound_deployment
    assert ingress.num_replicas == 2
    replica = ingress.init_args[0]._bound_deployment
    assert replica.ray_actor_options == {"num_cpus": 1.0, "num_gpus": 1.0}
    assert replica.max_ongoing_requests > 108, "the engine refuses what is too much, not Ray"
    config = replica._deployment_config
    assert config.graceful_shutdown_timeout_s > 20
    assert config.request_router_config.request_router_kwargs == {"factor": 1.25, "allowance": 2}
    assert (config.autoscaling_config.min_replicas, config.autoscaling_config.max_replicas) == (1, 5)
    assert config.autoscaling_config.target_ongoing_requests == 6
