"""Clients that leave, stall, flood or fail: no block stays held, and no other request says anything else."""

import asyncio
import contextlib
import json
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from jaxpaged import Engine
from jaxpaged.step_plan import ScheduledStep
from tests.serve.asynchronous import TIMEOUT, wait_until
from tests.serve.live_server import LiveServer, chatting, live_server
from tests.serve.served_engines import break_steps

COMPLETIONS = "/v1/completions"


def request_bytes(**fields: Any) -> bytes:
    body = json.dumps(fields).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def rest_of(sock: socket.socket) -> bytes:
    """What is left to read on a connection that the other side ends, in whatever way."""
    sock.settimeout(TIMEOUT)
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(1 << 16):
            received += part
    return received


def reset(sock: socket.socket) -> None:
    """Closes a connection by RST, as of a process that was killed."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


ASKED: dict[str, Any] = {"prompt": [9, 30, 77, 12], "max_tokens": 60, "temperature": 0, "ignore_eos": True}


class Witness:
    """A request whose text must not change, whatever others do meanwhile."""

    def __init__(self, live: LiveServer) -> None:
        self._live = live
        self.expected = live.complete(**ASKED)["choices"][0]["text"]
        self.texts: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.texts.append(self._live.complete(**ASKED)["choices"][0]["text"])

    def __enter__(self) -> "Witness":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(TIMEOUT)
        assert self.texts
        assert set(self.texts) == {self.expected}


def test_a_hundred_clients_leave_in_mid_stream(live: LiveServer) -> None:
    payload = request_bytes(prompt=[5, 6, 7], max_tokens=100, ignore_eos=True, stream=True, seed=1)

    def leave(number: int) -> None:
        sock = live.raw(payload)
        received = sock.recv(4096)
        while received.count(b"data: ") < number % 7:
            received += sock.recv(4096)
        (reset if number % 2 else socket.socket.close)(sock)

    with Witness(live), ThreadPoolExecutor(8) as pool:
        list(pool.map(leave, range(100)))
    live.settle()
    assert live.stats().finished.get("abort", 0) > 0


def test_clients_leave_before_the_first_token_and_without_a_stream(live: LiveServer) -> None:
    aborted = live.stats().finished.get("abort", 0)
    with Witness(live):
        for stream in (True, False):
            socks = [
                live.raw(request_bytes(prompt=[5] * 60, max_tokens=60, ignore_eos=True, stream=stream, n=4))
                for _ in range(8)
            ]
            wait_until(lambda: live.engine.num_unfinished > 8)
            for sock in socks:
                reset(sock)
            wait_until(lambda: live.engine.num_unfinished <= 1)
    live.settle()
    assert live.stats().finished["abort"] > aborted


def test_half_a_request_hurts_nobody(live: LiveServer) -> None:
    whole = request_bytes(prompt=[5], max_tokens=1)
    with Witness(live):
        socks = [live.raw(whole[:cut]) for cut in (1, 20, 60, len(whole) - 1)]
        socks += [
            live.raw(junk)
            for junk in (b"\x16\x03\x01\x02\x00", b"\x00" * 64, b"GET", b"PRI * HTTP/2.0\r\n\r\n")
        ]
        assert live.complete([5], max_tokens=1)["usage"]["completion_tokens"] == 1
        for sock in socks:
            sock.close()


def test_a_reader_that_stops_is_cut_off_and_frees_what_it_had() -> None:
    with live_server(send_timeout=1.0) as live, Witness(live):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.connect(("127.0.0.1", live.port))
        # Log-probabilities make long chunks, so that buffers are full before the request has ended.
        fields: dict[str, Any] = {"max_tokens": 110, "ignore_eos": True, "logprobs": 20, "n": 8, "seed": 1}
        sock.sendall(request_bytes(prompt=[5, 6], stream=True, return_token_ids=True, **fields))
        connections = live.server.config.http.open_connections  # type: ignore[union-attr]
        wait_until(lambda: connections.num_stalled == 1)
        wait_until(lambda: live.engine.num_unfinished <= 1)
        with sock:
            assert b"[DONE]" not in rest_of(sock)


def test_a_thousand_requests_at_twenty_times_what_fits() -> None:
    """Every one is answered or told to come back; what is answered is right."""
    body = {"prompt": [9, 30, 77, 12], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    with live_server(max_queue_length=42) as live:  # and 8 that run: a twentieth of what comes
        expected = live.complete(**body)["choices"][0]["text"]

        async def flood() -> list[httpx.Response]:
            limits = httpx.Limits(max_connections=None)
            base = f"http://127.0.0.1:{live.port}"
            async with httpx.AsyncClient(base_url=base, timeout=TIMEOUT, limits=limits) as client:
                return await asyncio.gather(*(client.post(COMPLETIONS, json=body) for _ in range(1000)))

        answers = asyncio.run(flood())
        statuses = {answer.status_code for answer in answers}
        assert statuses == {200, 429}
        for answer in answers:
            if answer.status_code == 200:
                assert answer.json()["choices"][0]["text"] == expected
            else:
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["code"] == "queue_full"
        live.settle()
        assert live.complete(**body)["choices"][0]["text"] == expected


def test_what_could_never_wait_is_told_so() -> None:
    with live_server(max_queue_length=2) as live:
        response = live.post(COMPLETIONS, prompt=[[5], [6]], n=6, max_tokens=2)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "prompt"
        assert len(live.complete([[5], [6]], n=5, max_tokens=2)["choices"]) == 10


def fail_when(live: LiveServer, length: int) -> None:
    """Steps with a request of so many prompt tokens raise from now on."""

    def fails(step: ScheduledStep) -> bool:
        return any(request.num_prompt_tokens == length for request, _ in step.rows)

    live.engine._thread.call(lambda engine: break_steps(engine, fails)).result(TIMEOUT)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_fails_leaves_the_pool_as_it_was(stream: bool) -> None:
    with live_server() as live:
        healthy = live.complete([9, 30, 77, 12], max_tokens=8)["choices"][0]["text"]
        fail_when(live, 33)
        for _ in range(6):
            before = live.stats()
            response = live.post(COMPLETIONS, prompt=[5] * 33, max_tokens=9, stream=stream)
            assert response.status_code == 500
            assert response.json()["error"] == {
                "message": "the request failed: Broken",
                "type": "server_error",
                "param": None,
                "code": "request_failed",
            }
            after = live.stats()
            assert (before.num_free_blocks, before.block_holders) == (
                after.num_free_blocks,
                after.block_holders,
            )
        assert live.complete([9, 30, 77, 12], max_tokens=8)["choices"][0]["text"] == healthy


def test_a_stream_that_fails_in_its_middle_says_so() -> None:
    with live_server() as live:
        calls = iter(range(10**6))

        def fails(step: ScheduledStep) -> bool:
            return any(r.num_prompt_tokens == 33 for r, _ in step.rows) and next(calls) > 9

        live.engine._thread.call(lambda engine: break_steps(engine, fails)).result(TIMEOUT)
        *chunks, last = live.events(
            COMPLETIONS, prompt=[5] * 33, max_tokens=50, ignore_eos=True, temperature=0
        )
        assert chunks
        assert all("choices" in chunk for chunk in chunks)
        assert last["error"]["code"] == "request_failed"


def test_requests_that_take_too_long() -> None:
    def slow(_: Any) -> Engine:
        engine = chatting()
        step = engine.step

        def slower() -> Any:
            threading.Event().wait(0.02)
            return step()

        engine.step = slower  # type: ignore[method-assign]
        return engine

    with live_server(slow, request_timeout=0.3) as live:
        fields: dict[str, Any] = {"prompt": [5, 6], "max_tokens": 100, "ignore_eos": True, "temperature": 0}
        response = live.post(COMPLETIONS, **fields)
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "request_timeout"
        *chunks, last = live.events(COMPLETIONS, **fields)
        assert chunks
        assert last["error"]["code"] == "request_timeout"


def test_streams_that_wait_get_comments() -> None:
    with live_server(keep_alive_interval=0.05) as live:
        goes_on = threading.Event()
        live.engine._thread.call(lambda _: goes_on.wait(TIMEOUT))
        sock = live.raw(request_bytes(prompt=[5], max_tokens=2, stream=True, temperature=0, ignore_eos=True))
        received = b""
        while received.count(b": keep-alive\n\n") < 3:
            received += sock.recv(4096)
        goes_on.set()
        while b"[DONE]" not in received:
            received += sock.recv(4096)
        assert received.index(b"keep-alive") < received.index(b"data: {")
        sock.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_mistake_of_ours_is_answered_too(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def mistaken(*_: object) -> None:
        raise KeyError("secret")

    with monkeypatch.context() as patched:
        patched.setattr(live.application.service, "check_params", mistaken)
        response = live.post(COMPLETIONS, prompt="a", stream=stream)
        assert response.status_code == 500
        assert response.json()["error"]["message"] == "the request failed: KeyError"
    live.complete("a", max_tokens=1)
