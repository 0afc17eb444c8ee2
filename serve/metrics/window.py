"""What happened in the last few seconds, in bounded memory: sums, and samples for percentiles."""

from collections import deque
from collections.abc import Iterable, Mapping

from jaxpaged.records import IterationRecord, RequestRecord

MAX_SAMPLES = 4096  # of each kind; of more the latest are kept
PERCENTS = (50, 90, 99)

Sample = tuple[float, int]  # a value, and how often


class Window:
    """Adds up records as they come.

    Invariants (``check_invariants``): at most ``MAX_SAMPLES`` samples of each kind are kept; there is a last record
    exactly if there was a step.
    """

    def __init__(self) -> None:
        self.last: IterationRecord | None = None
        self.num_steps = 0
        self._tokens = self._padded = self._prompt_tokens = self._generated = 0
        self._allocated = self._preempted = self._finished = 0
        self._host_seconds = self._seconds = 0.0
        names = ("step_time", "ttft", "itl", "tpot", "queue", "e2e", "attention")
        self._samples: dict[str, deque[Sample]] = {name: deque(maxlen=MAX_SAMPLES) for name in names}

    @property
    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return self.last is None and not any(self._samples.values())

    def stepped(self, record: IterationRecord) -> None:
        """A turn of the engine's loop has ended."""
        self.last = record
        num_steps = max(1, record.num_steps)
        self.num_steps += num_steps
        self._tokens += record.num_scheduled_tokens
        self._padded += record.num_padded_tokens
        self._prompt_tokens += record.num_prompt_tokens
        self._generated += record.num_generation_tokens
        self._allocated += record.blocks_allocated
        self._preempted += record.num_preempted
        seconds = record.iteration_time
        self._seconds += seconds
        self._host_seconds += seconds - record.device_time
        self._samples["step_time"].append((seconds / num_steps, num_steps))

    def ended(self, record: RequestRecord) -> None:
        """A completion has ended."""
        self._finished += 1
        samples = self._samples
        samples["e2e"].append((record.e2e_time, 1))
        for name, value in (
            ("ttft", record.time_to_first_token),
            ("tpot", record.time_per_output_token),
            ("queue", record.queue_time),
        ):
            if value is not None:
                samples[name].append((value, 1))

    def gaps(self, gaps: Mapping[float, int]) -> None:
        """Seconds between tokens, and how many tokens came after each."""
        self._samples["itl"].extend(gaps.items())

    def attention(self, seconds: float) -> None:
        """One call of paged attention was measured."""
        self._samples["attention"].append((seconds, 1))

    def scalars(self, seconds: float) -> dict[str, float]:
        """Everything as one value a name, for a window of so many seconds; what has no samples is left out."""
        found = {
            "throughput/generation_tokens_per_second": self._generated / seconds,
            "throughput/prompt_tokens_per_second": self._prompt_tokens / seconds,
            "throughput/requests_per_second": self._finished / seconds,
            "kv/alloc_rate": self._allocated / seconds,
            "scheduler/preemptions": float(self._preempted),
        }
        if self.last is not None:
            found |= self._state(self.last)
        for name, samples in self._samples.items():
            group = f"latency/{name}" if name != "step_time" else "scheduler/step_time"
            marks = weighted_percentiles(samples, PERCENTS)
            found |= {f"{group}_p{percent}": mark for percent, mark in zip(PERCENTS, marks, strict=False)}
        return found

    def _state(self, last: IterationRecord) -> dict[str, float]:
        num_blocks = last.num_live_blocks + last.num_free_blocks
        return {
            "scheduler/running": last.num_running,
            "scheduler/waiting": last.num_waiting,
            "scheduler/swapped": last.num_swapped,
            "scheduler/tokens_per_step": self._tokens / max(1, self.num_steps),
            "scheduler/padding_waste": self._padded / max(1, self._padded + self._tokens),
            "scheduler/step_time_mean": self._seconds / max(1, self.num_steps),
            "scheduler/host_time_share": self._host_seconds / self._seconds if self._seconds > 0 else 0.0,
            "kv/usage": last.num_live_blocks / max(1, num_blocks),
            "kv/free_blocks": last.num_free_blocks,
            "kv/cached_blocks": last.num_cached_blocks,
            "kv/live_blocks": last.num_live_blocks,
            "kv/fragmentation": last.internal_fragmentation,
        }

    def check_invariants(self) -> None:
        """Asserts the invariants."""
        assert all(len(samples) <= MAX_SAMPLES for samples in self._samples.values()), "too many samples"
        assert (self.last is None) == (self.num_steps == 0), "steps without a record"


def weighted_percentiles(samples: Iterable[Sample], percents: Iterable[int]) -> list[float]:
    """For each percentage the least value that so many of the samples do not exceed; [] without samples.

    That is the nearest-rank percentile, of each value repeated as often as its sample says.
    """
    ascending = sorted(samples)
    total = sum(count for _, count in ascending)
    if not total:
        return []
    marks = []
    for percent in percents:
        passed = 0
        for value, count in ascending:
            passed += count
            if 100 * passed >= percent * total:
                marks.append(value)
                break
    return marks
