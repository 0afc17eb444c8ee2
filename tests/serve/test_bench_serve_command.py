"""``jaxpaged bench serve`` from its command line to its table, its files and its exit status."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.bench_serve_command import run
from tests.serve.fake_openai import (
    DEADLINE,
    STREAM_HEAD,
    FakeServer,
    Request,
    chunked,
    completion_events,
    event,
    well_behaved,
    whole,
)
from tests.support.repository import ROOT

SMALL = ("--num-prompts=6", "--random-input-len=5", "--random-output-len=4")


def record_of(tmp_path: Path, server: FakeServer, *arguments: object) -> dict[str, Any]:
    """The record of a run that must succeed."""
    target = tmp_path / "figures.json"
    result = run("--base-url", server.url, "--json", target, *arguments)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output, "an escape sequence without a terminal"
    return json.loads(target.read_text())


def test_the_table_and_the_record(tmp_path: Path) -> None:
    target, plot = tmp_path / "figures.json", tmp_path / "figures.png"
    with FakeServer() as server:
        arguments = ("--base-url", server.url + "/v1", "--json", target, "--plot", plot, "--save-detailed")
        more = ("--num-warmups", 2, "--goodput", "ttft:60000 e2el:60000", "--api-key", "secret-key")
        result = run(*arguments, *SMALL, *more)
    assert result.exit_code == 0, result.output
    for label in ("time to first token", "time per output token", "good requests/s", "peak concurrency"):
        assert label in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    record = json.loads(target.read_text())
    assert "secret-key" not in target.read_text()
    assert record["server"] == {
        "base_url": server.url + "/v1",
        "path": "completions",
        "model": "fake-model",
        "software": "",
    }
    assert {"python", "jaxpaged", "httptools"} <= set(record["versions"])
    assert set(record["hardware"]) == {"cpu", "cores"}
    figures = record["result"]
    assert (figures["completed"], figures["failed"], figures["unfinished"]) == (6, 0, 0)
    assert (figures["prompt_tokens"], figures["output_tokens"]) == (30, 24)
    assert figures["output_tokens_per_second"] == pytest.approx(24 / figures["seconds"])
    assert figures["output_tokens_counted_by"] == "usage"
    assert figures["goodput"]["share_of_requests"] == 1
    assert 1 <= figures["peak_concurrency"] <= 6
    assert set(figures["itl"]) == {"mean", "std", "min", "max", "p50", "p90", "p95", "p99"}
    assert record["client"]["chunks"] > 0
    assert record["errors"] == []
    assert len(record["requests"]) == 6
    assert record["requests"][3]["text"] == "t0 t1 t2 t3 "
    assert len(record["requests"][3]["itl"]) == 3
    assert plot.read_bytes().startswith(b"\x89PNG")
    # Two warm-ups came first, and are in no figure.
    sent = server.requests
    assert len(sent) == 8
    assert all(request.headers["authorization"] == "Bearer secret-key" for request in sent)
    assert all(request.body["ignore_eos"] and request.body["max_tokens"] == 4 for request in sent)
    assert len({request.headers["x-request-id"] for request in sent}) == 8


def test_a_chat_of_a_file(tmp_path: Path) -> None:
    workload = tmp_path / "chats.jsonl"
    workload.write_text('{"prompt": "one two three"}\n{"prompt": "four", "out": 2}\n')
    with FakeServer() as server:
        record = record_of(tmp_path, server, workload, "--endpoint", "chat", "--model", "mine", "-t", 0.5)
    assert {request.path for request in server.requests} == {"/v1/chat/completions"}
    assert {request.body["model"] for request in server.requests} == {"mine"}
    assert {request.body["temperature"] for request in server.requests} == {0.5}
    # The end of the text is ignored only where the length of the answer is given.
    assert {
        len(request.body["messages"][0]["content"]): "ignore_eos" in request.body
        for request in server.requests
    } == {
        13: False,
        4: True,
    }
    assert record["result"]["prompt_tokens"] == 4
    assert record["result"]["output_tokens"] == 128 + 2
    assert record["workload"]["name"] == "chats.jsonl"


def test_a_server_without_usage_and_repeated_prompts(tmp_path: Path) -> None:
    async def script(request: Request) -> AsyncIterator[bytes | float | bool]:
        yield STREAM_HEAD
        for data in [*completion_events(3), b""]:
            yield chunked(data)

    workload = tmp_path / "w.json"
    workload.write_text('[{"prompt": "x", "out": 3}]')
    with FakeServer(script) as server:
        record = record_of(tmp_path, server, workload, "--model", "m", "--num-prompts", 2)
    assert record["result"]["output_tokens_counted_by"] == "chunks"
    assert record["result"]["total_tokens_per_second"] is None
    told = " ".join(record["notes"])
    for said in ("sent no usage", "prompt tokens is not known", "2 requests of 1 prompts"):
        assert said in told


def test_requests_come_at_their_rate(tmp_path: Path) -> None:
    with FakeServer() as server:
        record = record_of(
            tmp_path, server, *SMALL, "--request-rate", 50, "--burstiness", 1000, "--save-detailed"
        )
    sent = [request["sent"] for request in record["requests"]]
    assert sent == sorted(sent)
    assert sent[-1] >= 5 / 50
    assert record["result"]["seconds"] >= 5 / 50


async def every_kind_of_failure(request: Request) -> AsyncIterator[bytes | float | bool]:
    """The answer depends on the length of the prompt."""
    if request.method == "GET":
        async for step in well_behaved(request):
            yield step
        return
    match len(request.body["prompt"]):
        case 1:
            yield whole(429, {"error": {"message": "too many"}})
        case 2:
            yield STREAM_HEAD
            yield chunked(completion_events(2)[0])
            yield False
        case 3:
            yield STREAM_HEAD
            yield chunked(event({"error": {"message": "the step failed"}}))
            yield chunked(b"")
        case 4:
            yield STREAM_HEAD
            yield DEADLINE
        case _:
            async for step in well_behaved(request):
                yield step


def test_failures_are_counted_and_shown(tmp_path: Path) -> None:
    workload, target = tmp_path / "w.json", tmp_path / "out.json"
    workload.write_text(json.dumps([{"prompt": "x" * n, "out": 2} for n in (1, 1, 2, 3, 4, 5)]))
    with FakeServer(every_kind_of_failure) as server:
        result = run(workload, "--base-url", server.url, "--timeout", 1, "--json", target)
    assert result.exit_code == 0, result.output
    for said in (
        "failed requests",
        "status 429",
        "too many",
        "broken connection",
        "the step failed",
        "timeout",
    ):
        assert said in result.stdout
    record = json.loads(target.read_text())
    assert {error["kind"]: error["count"] for error in record["errors"]} == {
        "status 429": 2,
        "broken connection": 1,
        "error in the stream": 1,
        "timeout": 1,
    }
    assert (record["result"]["completed"], record["result"]["failed"]) == (1, 5)
    assert record["result"]["output_tokens"] == 2


def test_a_run_in_which_every_request_fails(tmp_path: Path) -> None:
    workload, target = tmp_path / "w.json", tmp_path / "out.json"
    workload.write_text(json.dumps([{"prompt": "x", "out": 2}] * 3))
    with FakeServer(every_kind_of_failure) as server:
        arguments = (workload, "--base-url", server.url, "--json", target, "--plot", tmp_path / "out.svg")
        result = run(*arguments)
        warmed = run(*arguments, "--num-warmups", 2)
    assert result.exit_code == 1
    assert "every request failed; the first: status 429: too many" in result.stderr
    assert json.loads(target.read_text())["result"]["failed"] == 3
    assert (tmp_path / "out.svg").is_file()
    assert warmed.exit_code == 1
    assert "every warm-up request failed; the first: status 429: too many" in warmed.stderr


def test_nobody_there() -> None:
    result = run("--base-url", "http://127.0.0.1:1", "--model", "m")
    assert result.exit_code == 2
    assert (
        result.stderr
        == "error: --base-url=http://127.0.0.1:1: connection refused: is a server running there?\n"
    )


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (whole(401, {"error": {"message": "no key"}}), "/v1/models says 401: no key"),
        (whole(200, {"data": []}), "names no model"),
        (whole(200, b"hello"), "names no model"),
    ],
    ids=["refused", "empty", "text"],
)
def test_servers_that_name_no_model(body: bytes, named: str) -> None:
    async def script(request: Request) -> AsyncIterator[bytes | float | bool]:
        yield body

    with FakeServer(script) as server:
        result = run("--base-url", server.url)
    assert result.exit_code == 2
    assert named in result.stderr
    assert "--model" in result.stderr


def test_waiting_for_a_server_that_is_not_ready() -> None:
    ready = threading.Event()

    async def script(request: Request) -> AsyncIterator[bytes | float | bool]:
        if request.path == "/health":
            yield whole(200 if ready.is_set() else 503, {"error": {"message": "compiling 3 of 9"}})
            ready.set()
        else:
            async for step in well_behaved(request):
                yield step

    with FakeServer(script) as server:
        impatient = run("--base-url", server.url, *SMALL)
        ready.clear()
        patient = run("--base-url", server.url, *SMALL, "--ready-timeout", DEADLINE)
    assert impatient.exit_code == 2
    assert "compiling 3 of 9" in impatient.stderr
    assert patient.exit_code == 0


def test_an_unknown_format_of_a_picture_is_named(tmp_path: Path) -> None:
    with FakeServer() as server:
        result = run("--base-url", server.url, *SMALL, "--plot", tmp_path / "x.nothing")
    assert result.exit_code == 2
    assert "--plot=" in result.stderr


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_control_c_shows_what_was_measured(tmp_path: Path) -> None:
    count = iter(range(99))

    async def script(request: Request) -> AsyncIterator[bytes | float | bool]:
        if request.method == "POST" and next(count) >= 2:
            yield 10 * DEADLINE
        async for step in well_behaved(request):
            yield step

    target = tmp_path / "out.json"
    with FakeServer(script) as server:
        arguments = ["--base-url", server.url, *SMALL, "--max-concurrency", "1", "--json", str(target)]
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.serve.bench_serve_command", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: len(server.requests) == 3)  # one at a time: two have been answered
        process.send_signal(signal.SIGINT)
        try:
            shown, said = process.communicate(timeout=DEADLINE)
        finally:
            process.kill()
    assert process.returncode == 130, said
    assert "unfinished" in shown
    assert "interrupted" in shown
    record = json.loads(target.read_text())
    assert (record["result"]["completed"], record["result"]["unfinished"]) == (2, 4)


def test_the_client_leaves_jax_alone() -> None:
    program = (
        "import sys, jaxpaged.serve.bench_serve.run; print('jax' in sys.modules, 'matplotlib' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["False", "False"]


def test_the_options_need_neither_http_nor_numbers() -> None:
    program = """
import sys
import jaxpaged.serve.bench_serve.options
print({"numpy", "httptools", "uvloop"} & set(sys.modules))
"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "set()"
