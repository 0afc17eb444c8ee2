"""The access log: what a line says, what it never says, and what happens when it cannot be written."""

import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxpaged.errors import InvalidRequestError
from jaxpaged.serve.metrics import access_log
from jaxpaged.serve.metrics.access_log import AccessEntry, AccessLog

FIELDS = [
    *("time", "request_id", "client", "method", "route", "status", "model"),
    *("prompt_tokens", "cached_tokens", "completion_tokens", "queue_ms", "ttft_ms", "duration_ms"),
    *("finish_reason", "error"),
]


def entry(**fields: Any) -> AccessEntry:
    given = {
        "request_id": "cmpl-1",
        "client": "127.0.0.1",
        "method": "POST",
        "route": "/v1/completions",
        "status": 200,
        "duration": 1.25,
    }
    return AccessEntry(**(given | fields))


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def test_a_request_is_one_line(tmp_path: Path) -> None:
    log = AccessLog(tmp_path / "access.log")
    log.write(
        entry(
            model="tiny",
            prompt_tokens=12,
            cached_tokens=8,
            completion_tokens=34,
            queue_time=0.0015,
            time_to_first_token=0.02345678,
            finish_reason="stop",
        )
    )
    log.write(entry(request_id="cmpl-2", status=503, duration=0.0004, error="EngineDeadError"))
    log.close()
    first, second = written(tmp_path / "access.log")
    assert list(first) == list(second) == FIELDS
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert first == {
        "request_id": "cmpl-1",
        "client": "127.0.0.1",
        "method": "POST",
        "route": "/v1/completions",
        "status": 200,
        "model": "tiny",
        "prompt_tokens": 12,
        "cached_tokens": 8,
        "completion_tokens": 34,
        "queue_ms": 1.5,
        "ttft_ms": 23.457,
        "duration_ms": 1250.0,
        "finish_reason": "stop",
        "error": None,
    }
    assert second["error"] == "EngineDeadError"
    assert second["prompt_tokens"] is second["ttft_ms"] is second["model"] is None


def test_no_field_can_carry_what_was_said() -> None:
    assert not {"prompt", "text", "messages", "headers", "authorization", "api_key"} & set(FIELDS)
    stream = io.BytesIO()
    log = AccessLog(stream)
    secret = "prompt=my secret diary: must be at most 5 tokens"
    log.write(entry(error=secret))
    log.write(entry(error="x" * 65))
    log.close()
    assert b"diary" not in stream.getvalue()
    assert [json.loads(line)["error"] for line in stream.getvalue().splitlines()] == ["other", "other"]


HOSTILE = 'a\nb\rc\x00\x1b[31m\x7f\x85\u2028\u202e\udcff"\\}{é漢🙂'


def test_what_clients_write_stays_one_line_of_plain_characters() -> None:
    stream = io.BytesIO()
    log = AccessLog(stream)
    log.write(entry(request_id=HOSTILE, client=HOSTILE, method=HOSTILE, route=HOSTILE, model=HOSTILE))
    log.write(entry(request_id="y" * 100_000))
    log.close()
    data = stream.getvalue()
    assert data.count(b"\n") == 2
    assert set(data) <= {10, *range(32, 127)}
    first, second = (json.loads(line) for line in data.splitlines())
    assert first["request_id"] == first["route"] == HOSTILE
    assert second["request_id"] == "y" * access_log.MAX_TEXT


def test_times_that_are_no_numbers_leave_the_line_readable() -> None:
    stream = io.BytesIO()
    log = AccessLog(stream)
    log.write(entry(duration=float("nan"), queue_time=float("inf")))
    log.close()
    line = json.loads(stream.getvalue())
    assert line["duration_ms"] is line["queue_ms"] is None


def test_an_old_file_is_continued_and_shared(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    path.write_bytes(b'{"old":1}\n')
    logs = [AccessLog(path) for _ in range(4)]

    def write(log: AccessLog, number: int) -> None:
        for i in range(250):
            log.write(entry(request_id=f"{number}-{i}"))
        log.close()

    threads = [threading.Thread(target=write, args=(log, number)) for number, log in enumerate(logs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = written(path)
    assert lines[0] == {"old": 1}
    for number in range(4):
        own = [line["request_id"] for line in lines[1:] if line["request_id"].startswith(f"{number}-")]
        assert own == [f"{number}-{i}" for i in range(250)]


class FullDisk(io.RawIOBase):
    """Takes so many bytes, then none until there is room again."""

    def __init__(self, room: int) -> None:
        self.data, self.room = b"", room

    def write(self, data: Any) -> int:
        taken = bytes(data)[: self.room]
        if not taken:
            raise OSError(28, "No space left on device")
        self.room -= len(taken)
        self.data += taken
        return len(taken)


def test_a_full_disk_is_logged_once_and_spoils_one_line(caplog: pytest.LogCaptureFixture) -> None:
    disk: Any = FullDisk(room=100)
    with caplog.at_level(logging.WARNING):
        log = AccessLog(disk)
        for number in range(3):
            log.write(entry(request_id=f"lost-{number}"))
        until(lambda: log.num_lost == 3)
        disk.room = 100_000
        log.write(entry(request_id="kept"))
        log.close()
    assert [record.getMessage() for record in caplog.records] == [
        "access log: lines are lost: [Errno 28] No space left on device",
        "access log: 3 lines were lost",
    ]
    spoilt, kept, end = disk.data.split(b"\n")
    assert len(spoilt) == 100
    assert json.loads(kept)["request_id"] == "kept"
    assert end == b""


def test_a_closed_pipe_is_logged_once_and_the_server_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    read, write = os.pipe()
    with caplog.at_level(logging.WARNING), open(write, "wb", buffering=0) as stream:
        log = AccessLog(stream)
        os.close(read)
        for _ in range(20):
            log.write(entry())
        log.close()
    assert log.num_lost == 20
    failures = [r for r in caplog.records if "lines are lost" in r.getMessage()]
    assert len(failures) == 1
    assert "Broken pipe" in failures[0].getMessage()


def test_a_closed_stream_loses_lines_and_raises_nothing() -> None:
    stream = io.BytesIO()
    log = AccessLog(stream)
    stream.close()
    log.write(entry())
    log.close()
    assert log.num_lost == 1


def test_a_reader_that_does_not_read_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(access_log, "MAX_QUEUED", 500)
    monkeypatch.setattr(access_log, "CLOSE_SECONDS", 0.05)
    read, write = os.pipe()
    with open(write, "wb", buffering=0) as stream:
        log = AccessLog(stream)
        for _ in range(5_000):  # more than the pipe and the queue hold
            log.write(entry())
        until(lambda: log._queue.qsize() == 500 or log.num_lost > 0)
        log.close()  # gives up waiting
        assert log._thread.is_alive()
        assert log.num_lost > 0
        first = os.read(read, 1000).splitlines()[0]
        os.close(read)  # now the write fails
        until(lambda: not log._thread.is_alive())
    assert json.loads(first)["request_id"] == "cmpl-1"
    assert [r.getMessage() for r in caplog.records if "lines are lost" in r.getMessage()] == [
        "access log: lines are lost: whoever takes them does not keep up"
    ]


def test_off_writes_nothing_and_a_file_that_cannot_be_is_refused(tmp_path: Path) -> None:
    log = AccessLog.of_option("off")
    log.write(entry())
    log.close()
    assert log.num_lost == 0
    for path in (tmp_path, tmp_path / "no" / "folder", "a\0b"):
        with pytest.raises(InvalidRequestError, match=r"access_log=.*cannot be written to"):
            AccessLog.of_option(str(path))
    AccessLog.of_option(str(tmp_path / "named")).close()
    assert (tmp_path / "named").read_bytes() == b""


PROGRAM = """
from jaxpaged.serve.metrics.access_log import AccessEntry, AccessLog
log = AccessLog.of_option("-")
log.write(AccessEntry(request_id="r", client=None, method="GET", route="/health", status=200, duration=0.1))
log.close()
log.close()
"""


def test_a_dash_means_standard_output() -> None:
    result = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", PROGRAM],
        capture_output=True,
        check=True,
        text=True,
    )
    assert json.loads(result.stdout)["route"] == "/health"
    assert result.stderr == ""


def test_standard_output_without_a_descriptor_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stream))
    log = AccessLog.of_option("-")
    log.write(entry())
    log.close()
    assert json.loads(stream.getvalue())["status"] == 200


def test_a_line_costs_the_event_loop_little() -> None:
    log, one = AccessLog(io.BytesIO()), entry(prompt_tokens=5, queue_time=0.1)
    best = float("inf")
    for _ in range(5):
        begun = time.thread_time()
        for _ in range(200):
            log.write(one)
        best = min(best, (time.thread_time() - begun) / 200)
    log.close()
    assert best < 150e-6  # about 8 microseconds
