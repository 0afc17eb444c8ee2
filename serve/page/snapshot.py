"""What the page shows of an engine at one moment: plain numbers, taken between two steps in the engine's thread.

It holds ids of requests and counts of tokens, never a token or a text.
"""

import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxpaged import Engine
from jaxpaged.records import IterationRecord, RequestRecord
from jaxpaged.request import Request, RequestStatus

MAX_STEPS = 200  # steps that the page draws
MAX_SECONDS = 120  # seconds that it draws

# As the page knows them; a request that has ended is not live.
REQUEST_STATES = {
    RequestStatus.WAITING: 0,
    RequestStatus.RUNNING: 1,
    RequestStatus.PREEMPTED: 2,
    RequestStatus.SWAPPED: 3,
}


@dataclass(slots=True)
class RequestView:
    """One live completion; nobody changes it.

    ``progress`` is its state (``REQUEST_STATES``), tokens computed, tokens sampled, prompt tokens found in the cache,
    blocks on the host and preemptions. ``tables`` are its block ids, a list for each group of layers, 0 where there
    is no block.
    """

    request_id: str
    index: int
    num_prompt_tokens: int
    progress: tuple[int, ...]
    tables: tuple[list[int], ...]


class Second(NamedTuple):
    """One second of ``time.monotonic``: tokens sampled in it, and the most blocks that were held."""

    second: int
    num_tokens: int
    num_live_blocks: int


@dataclass(frozen=True)
class Snapshot:
    """An engine at one moment. Nobody changes anything in it.

    Attributes:
      number: counts snapshots, from 1; 0 is one of an engine that nobody has looked at yet.
      time: when it was taken, seconds of ``time.monotonic``.
      sizes: of the pool and of batches, which stay as they are; empty before the engine is ready.
      status: what the engine does, as the page is to show it.
      block_states: one byte a block, as ``Engine.block_states``.
      requests: live completions by a number that each of them keeps.
      steps: of the latest steps: number, steps in one program, tokens of prompts, other tokens, padding, requests
        running, requests waiting, milliseconds. ``num_steps`` counts all that ever came.
      seconds: the latest ones in which a step ended, oldest first.
      counters: figures by name.
    """

    number: int = 0
    time: float = 0.0
    sizes: Mapping[str, int] = field(default_factory=dict)
    status: Mapping[str, object] = field(default_factory=dict)
    block_states: bytes = b""
    requests: Mapping[int, RequestView] = field(default_factory=dict)
    steps: tuple[IterationRecord, ...] = ()
    num_steps: int = 0
    seconds: tuple[Second, ...] = ()
    counters: Mapping[str, float] = field(default_factory=dict)


class Observer:
    """Notes every step, and takes snapshots. All of it in the engine's thread; the notes cost below a microsecond.

    Attributes:
      num_steps: turns of the engine's loop so far; any thread may look at it.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self._steps: deque[IterationRecord] = deque(maxlen=MAX_STEPS)
        self._seconds: deque[Second] = deque(maxlen=MAX_SECONDS)
        self._numbers: dict[Request, int] = {}  # those of the last snapshot
        self._num_requests = 0
        self._num_snapshots = 0

    def stepped(self, record: IterationRecord) -> None:
        """A turn of the engine's loop has ended."""
        self._steps.append(record)
        second, tokens, live = int(record.time), record.num_generation_tokens, record.num_live_blocks
        if self._seconds and self._seconds[-1].second == second:
            last = self._seconds.pop()
            tokens, live = tokens + last.num_tokens, max(live, last.num_live_blocks)
        self._seconds.append(Second(second, tokens, live))
        self.num_steps += 1

    def ended(self, record: RequestRecord) -> None:
        """A completion has ended: the next snapshot will lack it."""

    def gaps(self, gaps: Mapping[float, int]) -> None:
        """Times between tokens are not shown."""

    def take(self, engine: Engine, status: Mapping[str, object]) -> Snapshot:
        """A snapshot of the engine as it is now."""
        self._num_snapshots += 1
        states = engine.block_states()
        return Snapshot(
            number=self._num_snapshots,
            time=time.monotonic(),
            sizes=_sizes(engine, len(states)),
            status=status,
            block_states=states,
            requests=self._views(engine.live_requests()),
            steps=tuple(self._steps),
            num_steps=self.num_steps,
            seconds=tuple(self._seconds),
            counters=_counters(engine),
        )

    def next_number(self) -> int:
        """A number for a snapshot that is made otherwise, while no other is being taken."""
        self._num_snapshots += 1
        return self._num_snapshots

    def forget(self) -> None:
        """Lets go of the requests of the last snapshot; those that live on get new numbers."""
        self._numbers = {}

    def _views(self, requests: Iterable[Request]) -> dict[int, RequestView]:
        before, self._numbers = self._numbers, {}
        views = {}
        for request in requests:
            state = REQUEST_STATES.get(request.status)
            if state is None:
                continue
            number = before.get(request)
            if number is None:
                self._num_requests = number = self._num_requests + 1
            self._numbers[request] = number
            host = request.host_tables
            progress = (
                state,
                request.num_computed_tokens,
                request.num_output_tokens,
                request.num_cached_tokens,
                0 if host is None else sum(block >= 0 for table in host for block in table),
                request.num_preemptions,
            )
            tables = tuple([table.ids[:] for table in request.tables])
            views[number] = RequestView(
                request.request_id, request.index, request.num_prompt_tokens, progress, tables
            )
        return views


def _sizes(engine: Engine, num_blocks: int) -> dict[str, int]:
    config = engine.config
    return {
        "num_blocks": num_blocks,
        "block_size": config.block_size,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "max_model_len": config.max_model_len,
    }


def _counters(engine: Engine) -> dict[str, float]:
    stats = engine.stats()
    return {
        "num_running": stats.num_requests_running,
        "num_waiting": stats.num_requests_waiting,
        "num_swapped": stats.num_requests_swapped,
        "num_prompt_tokens": stats.num_prompt_tokens,
        "num_generation_tokens": stats.num_generation_tokens,
        "num_steps": stats.num_steps,
        "num_tokens": stats.num_tokens,
        "num_padded_tokens": stats.num_padded_tokens,
        "num_preemptions": stats.num_preemptions,
        "prefix_cache_queries": stats.prefix_cache_queries,
        "prefix_cache_hits": stats.prefix_cache_hits,
        "internal_fragmentation": round(stats.internal_fragmentation, 3),
        "num_pinned_prefixes": stats.num_pinned_prefixes,
        "num_host_blocks": stats.num_host_blocks,
        "num_host_blocks_held": stats.num_host_blocks_held,
        "num_host_blocks_cached": stats.num_host_blocks_cached,
        "num_finished": sum(stats.finished.values()),
    }
