"""One sequence on its way through the engine: host state only, plain ints."""

import enum
import time

from jaxpaged.block_table import BlockTable
from jaxpaged.sampling_params import SamplingParams


class RequestStatus(enum.Enum):
    """Where a request is. The FINISHED values are those of ``finish_reason``.

    ``is_finished`` says whether it will never run again. It is asked several times for each row of each step, so it is
    an attribute: to look a member up in a set calls its hash, which is Python.
    """

    is_finished: bool

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"  # waits again; what it had computed is gone, its tokens are not
    SWAPPED = "swapped"  # waits again; what it had computed is in host memory
    FINISHED_STOPPED = "stop"
    FINISHED_LENGTH = "length"
    FINISHED_ABORTED = "abort"
    FINISHED_ERROR = "error"
    FINISHED_TIMEOUT = "timeout"  # its deadline or its longest time in the queue has passed

    def __init__(self, _value: str) -> None:
        self.is_finished = self._name_.startswith("FINISHED")


class Request:
    """One sequence: its tokens, how many of them are computed, and its blocks.

    There is no prefill and no decode phase. A request is behind by ``num_tokens - num_computed_tokens``; each
    step lets it catch up by some tokens, and when it has caught up, one token is sampled.

    A step that was handed to the device counts as computed, although its results are not known yet: the request has
    ``num_pending`` tokens then that are sampled, or will be, and that only the device knows.

    Invariants: ``num_computed_tokens <= num_tokens + num_pending``; ``token_ids`` is the prompt followed by the output
    and only grows; ``row`` is 0 exactly while the request is not running.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        block_size: int,
        max_tokens: int,
        stop_token_ids: frozenset[int] = frozenset(),
        eos_token_ids: frozenset[int] = frozenset(),
        index: int = 0,
        cache_salt: str | None = None,
        num_tables: int = 1,
        priority: int = 0,
        tenant: str = "",
        deadline: float | None = None,
        queue_deadline: float | None = None,
    ) -> None:
        self.request_id = request_id
        self.index = index  # which of the n completions
        self.priority = priority  # smaller goes first
        self.tenant = tenant
        # Seconds of ``time.monotonic``: when it must have finished, and when it must have begun to run.
        self.deadline = deadline
        self.queue_deadline = queue_deadline
        self.arrival_index = 0  # the scheduler counts requests as they come
        self.params = params
        self.max_tokens = max_tokens
        self.stop_token_ids = stop_token_ids
        self.eos_token_ids = eos_token_ids
        self._end_ids = stop_token_ids | eos_token_ids
        self.cache_salt = cache_salt
        self.num_prompt_tokens = len(prompt_token_ids)
        self.token_ids = list(prompt_token_ids)
        # One table for each group of layers (``KVLayout``); nearly always there is one group.
        self.tables = tuple(BlockTable(block_size) for _ in range(num_tables))
        self.table = self.tables[0]
        self.host_tables: list[list[int]] | None = (
            None  # host blocks in place of the tables while swapped out
        )
        self.block_hashes: list[bytes] = []
        self.num_published = 0  # leading blocks that were offered to the prefix cache
        self.num_computed_tokens = 0
        self.num_pending = 0
        self.max_total_tokens = self.num_prompt_tokens + max_tokens
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.num_admissions = 0  # how often it was given a row
        self.status = RequestStatus.WAITING
        self.stop_reason: int | str | None = None
        self.row = 0
        self.may_share = False  # whether the block it writes to may have another holder, after a fork
        self.forks: list[Request] = []  # completions that wait for this one's prompt
        self.arrival_time = time.monotonic()
        self.needs_all_logits = params.prompt_logprobs is not None
        # Log-probabilities come with each step's own output.
        self.needs_single_steps = params.logprobs is not None
        # What comes next depends on the tokens themselves, on the host: no step ahead of them.
        self.needs_tokens_on_host = False
        # A beam of a beam search: its group (``BeamGroup``) decides with which token it goes on. Until then it is held:
        # all its tokens are computed, and there is nothing to run.
        self.is_beam = False
        self.is_held = False

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, index={self.index}, {self.status.value}, "
            f"tokens={self.num_tokens}, computed={self.num_computed_tokens})"
        )

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.token_ids)

    @property
    def holds_blocks(self) -> bool:
        """Whether it has blocks in the pool."""
        return bool(self.table.ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens sampled so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """The sampled tokens."""
        return self.token_ids[self.num_prompt_tokens :]

    def common_length(self, other: "Request") -> int:
        """How many tokens both begin with."""
        pairs = zip(self.token_ids, other.token_ids, strict=False)
        same = min(len(self.token_ids), len(other.token_ids))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), same)

    def append(self, token_id: int) -> RequestStatus | None:
        """Adds a sampled token; returns the status to finish with when the token ends the request."""
        self.token_ids.append(token_id)
        num_output = len(self.token_ids) - self.num_prompt_tokens
        if token_id in self._end_ids and num_output >= self.params.min_tokens:
            self.stop_reason = token_id if token_id in self.stop_token_ids else None
            return RequestStatus.FINISHED_STOPPED
        return RequestStatus.FINISHED_LENGTH if num_output >= self.max_tokens else None
