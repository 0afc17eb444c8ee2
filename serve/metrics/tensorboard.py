"""Writes what an engine does to TensorBoard, every few seconds, from a thread of its own."""

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxpaged.errors import InvalidRequestError
from jaxpaged.records import IterationRecord, RequestRecord
from jaxpaged.serve.metrics.window import Window

if TYPE_CHECKING:
    from jaxpaged.outputs import EngineStats

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 10.0  # how long closing waits for a disk that does not answer


class TensorBoardWriter:
    """A ``Listener`` of an engine that writes scalars every ``interval`` seconds.

    Each window of ``interval`` seconds is one point of every curve: rates, percentiles and means over the window,
    and how things stood after its last step, whose number is the point's step. A window in which nothing happens
    after one in which something did gives one more point, of zeros, so that curves come down; the rest of an idle
    time writes nothing.

    The engine's thread only adds to the current window, a microsecond or two a call. A write that fails is logged,
    once, and ends the writing; the engine goes on.

    Args:
      logdir: folder for the event file; made where there is none.
      interval: seconds between two points.
      stats: gives a snapshot of the engine, or None; called in the writer's thread before each point. It adds what
        records of steps do not tell: reuse, waste, shared blocks, holders of blocks, device memory.

    Raises:
      ImportError: tensorboardX is not installed.
      InvalidRequestError: ``interval`` is not positive, or nothing can be written to ``logdir``.
    """

    def __init__(
        self,
        logdir: str | Path,
        *,
        interval: float = 5.0,
        stats: "Callable[[], EngineStats | None] | None" = None,
    ) -> None:
        if not interval > 0:
            raise InvalidRequestError("interval", interval, "must be a positive number of seconds")
        self._interval = interval
        self._read_stats = stats
        self._file: _EventFile | None = _EventFile(Path(logdir))
        self._lock = threading.Lock()
        self._window = Window()
        self._begun = time.monotonic()
        self._step = 0  # of the last point
        self._was_idle = True
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jaxpaged-tensorboard", daemon=True)
        self._thread.start()

    # What the engine's thread calls.

    def stepped(self, record: IterationRecord) -> None:
        """A turn of the engine's loop has ended."""
        with self._lock:
            self._window.stepped(record)

    def ended(self, record: RequestRecord) -> None:
        """A completion has ended."""
        with self._lock:
            self._window.ended(record)

    def gaps(self, gaps: Mapping[float, int]) -> None:
        """Seconds between tokens, and how many tokens came after each."""
        with self._lock:
            self._window.gaps(gaps)

    def observe_attention(self, seconds: float) -> None:
        """One call of paged attention was measured."""
        with self._lock:
            self._window.attention(seconds)

    def close(self) -> None:
        """Writes what is left and closes the file; closing twice is fine."""
        self._closing.set()
        self._thread.join(CLOSE_SECONDS)

    # What its own thread does.

    def _run(self) -> None:
        while not self._closing.wait(self._interval):
            self._write_point()
        self._write_point()
        if self._file is not None:
            self._file.close()

    def _write_point(self) -> None:
        now = time.monotonic()
        with self._lock:
            window, self._window = self._window, Window()
        seconds, self._begun = max(now - self._begun, 1e-9), now
        if window.is_empty and self._was_idle:
            return
        self._was_idle = window.is_empty
        if window.last is not None:
            self._step = window.last.step
        scalars, stats = window.scalars(seconds), self._snapshot()
        if stats is not None:
            scalars |= _scalars_of(stats)
        if self._file is None:
            return
        try:
            self._file.write(self._step, scalars, {} if stats is None else stats.block_holders)
        except OSError as error:
            logger.warning("TensorBoard: writing to %s failed, it gets no more: %s", self._file.folder, error)
            self._file.close()
            self._file = None

    def _snapshot(self) -> "EngineStats | None":
        if self._read_stats is None:
            return None
        try:
            return self._read_stats()
        except Exception:
            # There is none while an engine starts, and none of one that has died.
            logger.debug("TensorBoard: no statistics", exc_info=True)
            return None


def _scalars_of(stats: "EngineStats") -> dict[str, float]:
    found = {
        "kv/reuse_rate": stats.reuse_rate,
        "kv/prefix_hit_rate": stats.prefix_hit_rate,
        "kv/waste": stats.kv_waste,
        "kv/shared_blocks": float(sum(n for holders, n in stats.block_holders.items() if holders > 1)),
        "kv/host_blocks_held": float(stats.num_host_blocks_held),
        "engine/compiles": float(stats.num_compiles),
    }
    if stats.device_memory_in_use is not None:
        found["memory/gpu_mem_used"] = float(stats.device_memory_in_use)
    return found


class _EventFile:
    """One event file, written in the thread that calls.

    tensorboardX's ``SummaryWriter`` has a thread and a bounded queue of its own. When that thread fails, on a full disk
    for instance, the queue fills up and whoever adds to it waits for ever; so this uses the layer below.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboardX import RecordWriter  # type: ignore[import-untyped]
            from tensorboardX.proto import event_pb2, summary_pb2  # type: ignore[import-untyped]
        except ImportError as error:
            raise ImportError("TensorBoard files need tensorboardX: pip install 'jaxpaged[serve]'") from error
        self._new_event, self._protocol = event_pb2.Event, summary_pb2
        self.folder = folder.absolute()  # never taken for a bucket's address, as "s3:runs" would be
        # TensorBoard knows its files by "tfevents" and takes them in the order of their names.
        unique = f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        name = f"events.out.tfevents.{time.time():.0f}.{unique}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._records = RecordWriter(str(self.folder / name))
            self._append(file_version="brain.Event:2")
        except OSError as error:
            raise InvalidRequestError("logdir", str(folder), f"cannot be written to: {error}") from error

    def write(self, step: int, scalars: Mapping[str, float], block_holders: Mapping[int, int]) -> None:
        """One point of every curve, and how many blocks have how many holders; on the disk when it returns."""
        make = self._protocol.Summary.Value
        values = [make(tag=tag, simple_value=value) for tag, value in scalars.items()]
        if block_holders:
            values.append(make(tag="kv/refcount_hist", histo=self._histogram(block_holders)))
        self._append(step=step, summary=self._protocol.Summary(value=values))

    def _append(self, **fields: Any) -> None:
        self._records.write(self._new_event(wall_time=time.time(), **fields).SerializeToString())
        self._records.flush()

    def _histogram(self, counts: Mapping[int, int]) -> Any:
        holders = sorted(counts)
        return self._protocol.HistogramProto(
            min=holders[0],
            max=holders[-1],
            num=sum(counts.values()),
            sum=sum(value * n for value, n in counts.items()),
            sum_squares=sum(value * value * n for value, n in counts.items()),
            bucket_limit=[value + 0.5 for value in holders],
            bucket=[counts[value] for value in holders],
        )

    def close(self) -> None:
        """Closes the file, whether or not what was left could be written."""
        try:
            self._records.close()
        except OSError as error:
            logger.warning("TensorBoard: closing the file in %s failed: %s", self.folder, error)
