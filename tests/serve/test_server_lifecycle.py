"""From the first byte to the last: listening while compiling, draining on SIGTERM, dying, refusing to start."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from jaxpaged import Engine
from jaxpaged.serve.engine_thread import StartProgress
from jaxpaged.serve.server.run import listening_socket
from tests.serve.asynchronous import TIMEOUT, wait_until
from tests.serve.command_line import SMALL, run
from tests.serve.live_server import chatting, live_server
from tests.serve.served_engines import break_steps

COMPLETIONS = "/v1/completions"
LONG: dict[str, Any] = {"prompt": [9, 30, 77, 12], "max_tokens": 400, "temperature": 0, "ignore_eos": True}


def test_it_listens_while_it_starts() -> None:
    goes_on = threading.Event()

    def make(tell: Callable[[StartProgress], None]) -> Engine:
        tell(StartProgress("compiling", 3, 7, 1.5))
        assert goes_on.wait(TIMEOUT)
        return chatting()

    with live_server(make, ready=False) as live:
        wait_until(lambda: live.engine.progress.stage == "compiling")
        health = live.client.get("/health")
        assert health.status_code == 503
        expected = {"stage": "compiling", "done": 3, "total": 7, "seconds": 1.5}
        assert health.json() == {"status": "starting", "progress": expected}
        for path, body in ((COMPLETIONS, {"prompt": "a"}), ("/tokenize", {"prompt": "a"})):
            refused = live.client.post(path, json=body)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "engine_not_ready"
            assert int(refused.headers["retry-after"]) > 0
        assert live.client.get("/v1/models").status_code == live.client.get("/metrics").status_code == 200
        goes_on.set()
        wait_until(lambda: live.client.get("/health").status_code == 200)
        live.complete("a", max_tokens=1)


def test_a_dead_engine_is_told_to_everybody() -> None:
    with live_server() as live:
        live.engine._thread.call(lambda engine: break_steps(engine, lambda _: True)).result(TIMEOUT)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: live.post(COMPLETIONS, **LONG | {"max_tokens": 50}), range(12)))
        assert {answer.status_code for answer in answers} <= {500, 503}
        wait_until(lambda: live.engine.state.value == "dead")
        assert live.client.get("/health").json() == {"status": "dead", "error": "Broken"}
        refused = live.post(COMPLETIONS, prompt="a")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "engine_dead"
        assert 'state="dead"} 1.0' in live.client.get("/metrics").text


@pytest.fixture
def process(checkpoint: Path) -> Iterator["Process"]:
    found = Process(checkpoint, "--drain-timeout", "60")
    yield found
    found.end()


class Process:
    """``jaxpaged serve`` as a process of its own."""

    def __init__(self, checkpoint: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "jaxpaged.serve", "serve", str(checkpoint), "--port", "0"]
        command += [*SMALL, "--num-scheduler-steps=1", "--seed=1", *arguments]
        self.popen = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.popen.stderr is not None
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        wait_until(lambda: self.port or self.popen.poll() is not None)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=TIMEOUT)

    def _read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.lines.append(line)

    @property
    def port(self) -> str:
        found = re.search(r"listening at http://127\.0\.0\.1:(\d+)", "".join(self.lines))
        return found[1] if found else ""

    def wait_ready(self) -> None:
        wait_until(lambda: self.client.get("/health").status_code == 200)

    def end(self) -> None:
        self.client.close()
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait(TIMEOUT)
        self._reader.join(TIMEOUT)
        assert self.popen.stderr is not None
        self.popen.stderr.close()


def answer(process: Process, stream: bool) -> str:
    """What a client gets that asks now: its whole text, a status, or how the connection ended."""
    try:
        if not stream:
            response = process.client.post(COMPLETIONS, json=LONG)
            return (
                response.json()["choices"][0]["text"]
                if response.status_code == 200
                else str(response.status_code)
            )
        with process.client.stream("POST", COMPLETIONS, json={**LONG, "stream": True}) as response:
            if response.status_code != 200:
                return str(response.status_code)
            data = [
                line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")
            ]
        assert data[-1] == "[DONE]"
        return "".join(json.loads(line)["choices"][0]["text"] for line in data[:-1])
    except httpx.ConnectError:
        return "refused"


@pytest.mark.slow
def test_sigterm_under_load_answers_everybody(process: Process) -> None:
    process.wait_ready()
    expected = answer(process, False)
    with ThreadPoolExecutor(24) as pool:
        early = [pool.submit(answer, process, number % 2 == 0) for number in range(16)]
        wait_until(
            lambda: (
                "num_requests_running" in (text := process.client.get("/metrics").text) and running(text) > 0
            )
        )
        process.popen.send_signal(signal.SIGTERM)
        wait_until(lambda: process.popen.poll() is not None or health(process) in ("503", "refused"))
        late = [pool.submit(answer, process, number % 2 == 0) for number in range(8)]
        answers = [future.result(TIMEOUT) for future in early]
        assert set(answers) <= {expected, "503"}
        assert answers.count(expected) >= 4  # those that ran were answered
        assert {future.result(TIMEOUT) for future in late} <= {"503", "refused"}
    assert process.popen.wait(TIMEOUT) == 0


def running(text: str) -> float:
    found = re.search(r"num_requests_running\{[^}]*\} (\S+)", text)
    return float(found[1]) if found else 0.0


def health(process: Process) -> str:
    try:
        return str(process.client.get("/health").status_code)
    except httpx.TransportError:
        return "refused"


@pytest.mark.slow
def test_sigterm_while_it_compiles_ends_it_soon(checkpoint: Path, tmp_path: Path) -> None:
    process = Process(checkpoint, "--compilation-cache", os.fspath(tmp_path / "none"))
    try:
        process.popen.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        assert process.popen.wait(TIMEOUT) == 0
        assert time.monotonic() - begun < TIMEOUT
    finally:
        process.end()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--max-n", "0"), "max_n=0"),
        (("--dtype", "int3"), "dtype='int3'"),
        (("--chat-template", "nowhere.jinja"), "nowhere.jinja"),
        (("--api-key-file", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_what_cannot_start_says_why(checkpoint: Path, arguments: tuple[str, ...], named: str) -> None:
    result = run("serve", checkpoint, "--port", "0", *SMALL, *arguments)
    assert result.exit_code in (1, 2)
    assert named in result.stderr
    assert "Traceback" not in result.stderr


def test_a_port_that_is_taken_is_named(checkpoint: Path) -> None:
    with listening_socket("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        result = run("serve", checkpoint, "--port", port)
    assert result.exit_code == 2
    assert f"--port={port}: cannot be listened at" in result.stderr
