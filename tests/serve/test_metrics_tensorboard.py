"""What TensorBoard gets, read back from its files."""

import builtins
import logging
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event

from jaxpaged import EngineStats
from jaxpaged.errors import InvalidRequestError
from jaxpaged.serve.metrics.tensorboard import TensorBoardWriter
from jaxpaged.serve.metrics.window import MAX_SAMPLES, Window, weighted_percentiles
from tests.engine.tiny import GREEDY, idle, prompt_of, shared_engine
from tests.serve.metrics_exposition import iteration, request

NEVER = 3600.0  # seconds: only closing writes


def checksum(data: bytes) -> int:
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def events(logdir: Path) -> list[Any]:
    """Every event of the one file in a folder. TFRecord: length, its checksum, the data, its checksum."""
    (path,) = logdir.iterdir()
    assert path.name.startswith("events.out.tfevents.")
    data, found = path.read_bytes(), []
    while data:
        length, crc = struct.unpack("<QI", data[:12])
        assert crc == checksum(data[:8])
        body, end = data[12 : 12 + length], data[12 + length : 16 + length]
        assert struct.unpack("<I", end) == (checksum(body),)
        found.append(Event.FromString(body))
        data = data[16 + length :]
    return found


def scalars(event: Any) -> dict[str, float]:
    return {v.tag: v.simple_value for v in event.summary.value if v.HasField("simple_value")}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[TensorBoardWriter]:
    made = TensorBoardWriter(tmp_path / "runs", interval=NEVER)
    yield made
    made.close()


def test_a_window_becomes_one_point(writer: TensorBoardWriter, tmp_path: Path) -> None:
    before = time.time()
    writer.stepped(iteration(3, num_steps=3, num_scheduled_tokens=24, num_padded_tokens=8))
    writer.stepped(
        iteration(
            4,
            num_running=5,
            num_waiting=2,
            num_generation_tokens=7,
            num_preempted=1,
            num_live_blocks=30,
            num_free_blocks=10,
            num_kv_tokens=90,
            blocks_allocated=6,
        )
    )
    writer.gaps({0.01: 97, 0.5: 3})
    writer.ended(request())
    writer.observe_attention(2e-5)
    writer.close()
    first, point = events(tmp_path / "runs")
    assert first.file_version == "brain.Event:2"
    assert point.step == 4
    assert before - 1 <= point.wall_time <= time.time() + 1
    found = scalars(point)
    for tag, value in {
        "scheduler/running": 5,
        "scheduler/waiting": 2,
        "scheduler/preemptions": 1,
        "scheduler/tokens_per_step": 8,
        "scheduler/padding_waste": 16 / 48,
        "scheduler/step_time_mean": 0.005,
        "scheduler/step_time_p50": 0.01 / 3,
        "scheduler/step_time_p99": 0.01,
        "scheduler/host_time_share": 0.4,
        "kv/usage": 0.75,
        "kv/free_blocks": 10,
        "kv/fragmentation": 0.25,
        "latency/itl_p50": 0.01,
        "latency/itl_p99": 0.5,
        "latency/ttft_p90": 0.3,
        "latency/e2e_p99": 1.3,
        "latency/queue_p50": 0.1,
        "latency/tpot_p50": 0.1,
        "latency/attention_p50": 2e-5,
    }.items():
        assert found[tag] == pytest.approx(value), tag
    assert found["throughput/generation_tokens_per_second"] > 0
    assert found["kv/alloc_rate"] == pytest.approx(found["throughput/generation_tokens_per_second"] * 6 / 7)


def test_points_come_by_themselves_and_idle_time_writes_one_of_zeros(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path, interval=0.02)
    writer.stepped(iteration(1, num_generation_tokens=1))
    until(lambda: len(events(tmp_path)) >= 3)
    writer.stepped(iteration(2, num_generation_tokens=1))
    until(lambda: len(events(tmp_path)) >= 5)
    writer.close()
    points = events(tmp_path)[1:]
    rates = [scalars(point)["throughput/generation_tokens_per_second"] for point in points]
    assert [rate > 0 for rate in rates] == [True, False, True, False]
    assert [point.step for point in points] == [1, 1, 2, 2]


def test_a_real_engine_and_its_statistics(tmp_path: Path) -> None:
    with idle(shared_engine()) as engine:
        snapshots: list[EngineStats] = []
        writer = TensorBoardWriter(tmp_path, interval=NEVER, stats=lambda: snapshots[-1])
        engine.generate([prompt_of(9, number) for number in range(3)], GREEDY)
        snapshots.append(engine.stats())
        for record in engine.iteration_records()[-20:]:
            writer.stepped(record)
        for ended in engine.request_records()[-3:]:
            writer.ended(ended)
        snapshots[0].block_holders = {1: 5, 2: 3, 7: 1}
        snapshots[0].device_memory_in_use = 1 << 20
        writer.close()
    _, point = events(tmp_path)
    found = scalars(point)
    assert found["latency/e2e_p50"] > 0
    assert found["kv/free_blocks"] == snapshots[0].num_free_blocks
    assert found["kv/reuse_rate"] == pytest.approx(snapshots[0].reuse_rate)
    assert found["kv/shared_blocks"] == 4
    assert found["memory/gpu_mem_used"] == 1 << 20
    (holders,) = (value.histo for value in point.summary.value if value.tag == "kv/refcount_hist")
    assert (holders.num, holders.sum, holders.min, holders.max) == (9, 18, 1, 7)
    assert list(holders.bucket) == [5, 3, 1]


def test_statistics_that_fail_leave_the_rest(tmp_path: Path) -> None:
    def fail() -> EngineStats:
        raise RuntimeError("the engine is dead")

    writer = TensorBoardWriter(tmp_path, interval=NEVER, stats=fail)
    writer.stepped(iteration(1))
    writer.close()
    assert scalars(events(tmp_path)[1])["scheduler/tokens_per_step"] == 8


def test_closing_twice_writes_once_and_what_comes_later_is_dropped(
    writer: TensorBoardWriter, tmp_path: Path
) -> None:
    writer.stepped(iteration(1))
    writer.close()
    writer.stepped(iteration(2))
    writer.close()
    assert [event.step for event in events(tmp_path / "runs")] == [0, 1]


def test_writers_of_one_folder_do_not_overwrite_each_other(tmp_path: Path) -> None:
    writers = [TensorBoardWriter(tmp_path, interval=NEVER) for _ in range(3)]
    for number, writer in enumerate(writers):
        writer.stepped(iteration(number))
        writer.close()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_write_that_fails_is_logged_once_and_nothing_hangs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = TensorBoardWriter(tmp_path, interval=0.01)
    file = writer._file
    assert file is not None

    def full(data: bytes) -> None:
        raise OSError(28, "No space left on device")

    file._records.write = full
    with caplog.at_level(logging.WARNING):
        writer.stepped(iteration(1))
        until(lambda: writer._file is None)
        writer.stepped(iteration(2))
        writer.close()
    assert not writer._thread.is_alive()
    assert [record.message for record in caplog.records if "No space left" in record.message] == [
        f"TensorBoard: writing to {tmp_path} failed, it gets no more: [Errno 28] No space left on device"
    ]


def test_memory_is_bounded() -> None:
    window = Window()
    for number in range(3 * MAX_SAMPLES):
        window.stepped(iteration(number))
        window.gaps({0.01: 4})
        window.ended(request())
    window.check_invariants()
    assert len(window._samples["itl"]) == MAX_SAMPLES
    assert window.scalars(2.0)["throughput/requests_per_second"] == 1.5 * MAX_SAMPLES


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 9)), min_size=1), st.sampled_from([1, 50, 90, 99]))
def test_percentiles_count_each_value_as_often_as_it_came(
    pairs: list[tuple[float, int]], percent: int
) -> None:
    repeated = [value for value, count in pairs for _ in range(count)]
    expected = np.percentile(repeated, percent, method="inverted_cdf")
    assert weighted_percentiles(pairs, [percent]) == [expected]


def test_no_samples_have_no_percentiles() -> None:
    assert weighted_percentiles([], [50, 99]) == []


def test_tensorboardx_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.startswith("tensorboardX"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"tensorboardX: pip install 'jaxpaged\[serve\]'"):
        TensorBoardWriter(tmp_path)
    assert not any(thread.name == "jaxpaged-tensorboard" for thread in threading.enumerate())


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequestError, match=r"logdir=.*cannot be written to"):
        TensorBoardWriter(tmp_path / "file" / "runs")
    for interval in (0.0, -1.0, float("nan")):
        with pytest.raises(InvalidRequestError, match="interval="):
            TensorBoardWriter(tmp_path, interval=interval)
