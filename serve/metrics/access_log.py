"""One line of JSON for each request that was answered: who, what, how much, how long; never what was said.

Prompts, outputs and keys have no field here, and the fields that there are cannot carry them: an error is a name, cut
down to the characters of one, and a route is a template.
"""

import json
import logging
import math
import os
import re
import sys
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import BinaryIO

from jaxpaged.errors import InvalidRequestError

logger = logging.getLogger(__name__)

MAX_TEXT = 256  # characters of a field
MAX_QUEUED = 4096  # lines that wait for a slow disk or pipe; what comes then is lost
CLOSE_SECONDS = 5.0  # how long closing waits for one that does not move at all
_ERROR_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


@dataclass(slots=True, kw_only=True)
class AccessEntry:
    """One request and its answer. None is what does not apply, or never came.

    Attributes:
      client: address of the client.
      route: template such as ``/v1/completions``, never the raw path.
      model: the one that answered, by our name, whatever the request called it.
      prompt_tokens, cached_tokens, completion_tokens: as in the answer's usage, all choices together.
      queue_time, time_to_first_token, duration: seconds.
      finish_reason: of the first choice.
      error: name of the class or code of what went wrong. What is not a name, as a message, is written as "other".
    """

    request_id: str
    client: str | None
    method: str
    route: str
    status: int
    duration: float
    model: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    queue_time: float | None = None
    time_to_first_token: float | None = None
    finish_reason: str | None = None
    error: str | None = None


class AccessLog:
    """Appends entries to a file or a stream, from a thread of its own.

    ``write`` never blocks and never raises, so neither a full disk nor a reader that has stopped reading holds up the
    server: while nothing can be written, lines wait, up to ``MAX_QUEUED``, and are lost after that. The first failure
    is logged, later ones only counted. A file is opened for appending and written to line by line, so that several
    servers may share one, and rotation by copying and truncating works.

    Args:
      target: a path, a binary stream, or None, which writes nothing.
      owned: whether closing the log closes the stream; it always closes what it opened itself.

    Raises:
      InvalidRequestError: the path cannot be opened for writing.
    """

    def __init__(self, target: str | Path | BinaryIO | None, *, owned: bool = False) -> None:
        self.num_lost = 0  # lines that were not written
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()
        self._failed = self._mid_line = False
        self._owned = owned or isinstance(target, str | Path)
        self._stream = _opened(target) if isinstance(target, str | Path) else target
        self._lock = threading.Lock()  # guards num_lost and closed
        self._closed = self._stream is None
        if self._stream is not None:
            self._thread = threading.Thread(target=self._run, name="jaxpaged-access-log", daemon=True)
            self._thread.start()

    @classmethod
    def of_option(cls, option: str) -> "AccessLog":
        """The log that a command line asks for: a file, "-" for standard output, or "off"."""
        if option == "off":
            return cls(None)
        if option != "-":
            return cls(option)
        try:
            # A descriptor of its own: what cannot be written is in no buffer that the interpreter flushes at its end.
            return cls(open(os.dup(sys.stdout.fileno()), "wb", buffering=0), owned=True)
        except (OSError, ValueError):  # a test's or a notebook's standard output has none
            return cls(sys.stdout.buffer)

    def write(self, entry: AccessEntry) -> None:
        """Notes a request that has been answered, now."""
        if self._closed:
            return
        try:
            line = _line(entry, datetime.now(UTC))
        except Exception as error:
            self._failure(error, 1)
            return
        if self._queue.qsize() >= MAX_QUEUED:
            self._failure("whoever takes them does not keep up", 1)
            return
        self._queue.put(line)

    def close(self) -> None:
        """Writes what waits, for a few seconds at most, and closes a file; closing twice is fine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._queue.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._lose(self._queue.qsize())
        if self.num_lost:
            logger.warning("access log: %d lines were lost", self.num_lost)

    def _run(self) -> None:
        ended = False
        while not ended:
            lines = [self._queue.get()]
            try:
                while len(lines) < MAX_QUEUED:
                    lines.append(self._queue.get_nowait())
            except Empty:
                pass
            ended = lines[-1] is None
            self._append([line for line in lines if line is not None])
        if self._owned and self._stream is not None:
            try:
                self._stream.close()
            except OSError as error:
                self._failure(error, 0)

    def _append(self, lines: list[bytes]) -> None:
        for number, line in enumerate(lines):
            try:
                # A line that was cut off when the disk was full gets its end first, so that only it is spoilt.
                self._write_all(b"\n" + line if self._mid_line else line)
            except (OSError, ValueError) as error:  # ValueError: the stream is closed
                self._failure(error, 1)
                if isinstance(error, ValueError | BrokenPipeError):
                    self._lose(len(lines) - number - 1)
                    return

    def _write_all(self, data: bytes) -> None:
        """One write a line, which keeps lines of several servers apart; a full disk takes part of one."""
        assert self._stream is not None, "nothing to write to"
        while data:
            count = self._stream.write(data)
            if not count:
                raise BlockingIOError("it takes nothing now")
            data = data[count:]
            self._mid_line = bool(data)
        self._stream.flush()

    def _failure(self, why: object, num_lost: int) -> None:
        self._lose(num_lost)
        if not self._failed:
            self._failed = True
            logger.warning("access log: lines are lost: %s", why)

    def _lose(self, count: int) -> None:
        with self._lock:
            self.num_lost += count


def _opened(path: str | Path) -> BinaryIO:
    try:
        return open(path, "ab", buffering=0)
    except (OSError, ValueError) as error:
        raise InvalidRequestError("access_log", os.fspath(path), f"cannot be written to: {error}") from error


def _line(entry: AccessEntry, now: datetime) -> bytes:
    error = entry.error
    if error is not None and not _ERROR_NAME.fullmatch(error):
        error = "other"
    fields = {
        "time": now.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "request_id": _short(entry.request_id),
        "client": _short(entry.client),
        "method": _short(entry.method),
        "route": _short(entry.route),
        "status": entry.status,
        "model": _short(entry.model),
        "prompt_tokens": entry.prompt_tokens,
        "cached_tokens": entry.cached_tokens,
        "completion_tokens": entry.completion_tokens,
        "queue_ms": _milliseconds(entry.queue_time),
        "ttft_ms": _milliseconds(entry.time_to_first_token),
        "duration_ms": _milliseconds(entry.duration),
        "finish_reason": _short(entry.finish_reason),
        "error": error,
    }
    # ASCII only: every control character but DEL is escaped, as are line separators and lone surrogates.
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=True)
    return text.replace("\x7f", "\\u007f").encode("ascii") + b"\n"


def _short(text: str | None) -> str | None:
    return text if text is None else text[:MAX_TEXT]


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None or not math.isfinite(seconds) else round(seconds * 1000, 3)
