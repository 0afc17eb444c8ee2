"""Memory that holds meanings in place of numbers, to check what a scheduler does with real memory.

What the device does to a slot is simulated when a step is handed to it: the moves in plan order, then the writes, then
the reads. Host blocks are simulated likewise. The content of a slot is the token prefix whose key and value it holds,
for one group of layers. Any mistake in sharing, copying on write, evicting, swapping or publishing shows as a request
whose table holds another prefix than its own, or as a cached block that holds another one than its key says.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from jaxpaged.block_space import BlockSpace
from jaxpaged.host_tier import HostTier
from jaxpaged.prefix_cache import block_hashes, group_key
from jaxpaged.request import Request
from jaxpaged.sampling_params import SamplingParams
from jaxpaged.scheduler import ScheduledStep, Scheduler
from jaxpaged.step_plan import Move, MoveKind

Content = tuple[int, str | None, tuple[int, ...]]  # group, salt, prefix


def make_request(
    name: str,
    prompt: list[int],
    *,
    block_size: int,
    max_tokens: int = 4,
    n: int = 1,
    salt: str | None = None,
    eos: frozenset[int] = frozenset(),
    params: SamplingParams | None = None,
    **fields: Any,
) -> list[Request]:
    """The ``n`` completions of one prompt, chained the way the engine's intake chains them."""
    requests = [
        Request(
            name,
            prompt,
            params or SamplingParams(n=n, temperature=1.0, max_tokens=max_tokens),
            block_size=block_size,
            max_tokens=max_tokens,
            eos_token_ids=eos,
            index=index,
            cache_salt=salt,
            **fields,
        )
        for index in range(n)
    ]
    requests[0].forks = requests[1:]
    return requests


def make_scheduler(
    *,
    num_blocks: int,
    block_size: int,
    max_num_seqs: int = 4,
    budget: int = 16,
    watermark: float = 0.0,
    caching: bool = True,
    windows: tuple[int | None, ...] = (None,),
    num_host_blocks: int | None = None,
    **options: Any,
) -> Scheduler:
    """A scheduler over a pool of its own; ``options`` are those of ``Scheduler``."""
    host = None if num_host_blocks is None else HostTier(num_host_blocks)
    space = BlockSpace(num_blocks, block_size, caching, windows, host)
    return Scheduler(
        space,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(budget, max_num_seqs),
        watermark=watermark,
        **options,
    )


@lru_cache(100_000)
def key_of(content: Content, block_size: int) -> bytes:
    """The cache key of a full block whose last slot holds this."""
    group, salt, prefix = content
    return group_key(block_hashes(prefix, block_size, salt=salt)[-1], group)


class PoolModel:
    """Simulated memory of one scheduler, device and host; its methods assert.

    The device also knows tokens before the host does: ``pending`` are those that it has sampled and nobody has
    collected. The next step finds such a token by the row that sampled it, and only the last one.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.space = scheduler.space
        self.scheduler = scheduler
        self.slots: dict[int, Content] = {}
        self.host: dict[int, list[Content | None]] = {}
        self.pending: dict[Request, list[int]] = {}
        self._sampled: dict[int, tuple[Request, int]] = {}  # by row: whose token, and its position

    def tokens(self, request: Request) -> list[int]:
        """All tokens of a request, as the device knows them."""
        return request.token_ids + self.pending.get(request, [])

    # What the device does.

    def run(self, step: ScheduledStep, sample: Callable[[], int]) -> list[list[int]]:
        """Executes a step that is not counted as computed yet; tokens of each of its decode steps, a row each.

        A row that has not caught up gets -1.
        """
        self.move(step.moves)
        columns = []
        for ahead in range(step.num_steps):
            spans = [(r, r.num_computed_tokens + ahead, count) for r, count in step.rows]
            known = {request: self.tokens(request) for request, _, _ in spans}
            for request, first, count in spans:
                self._write(request, known[request], first, first + count)
            for request, first, count in spans:
                self._read(request, known[request], first, first + count)
            column = []
            for request, first, count in spans:
                caught_up = first + count == len(known[request])
                column.append(sample() if caught_up else -1)
                if caught_up:
                    self.pending.setdefault(request, []).append(column[-1])
                    self._sampled[request.row] = request, len(known[request])
            columns.append(column)
        return columns

    def move(self, moves: Iterable[Move]) -> None:
        """One block after the other, as planned."""
        for kind, source, target in moves:
            block = self.host.get(source) if kind is MoveKind.SWAP_IN else self._block(source)
            assert block is not None, f"host block {source} is loaded and was never stored"
            if kind is MoveKind.SWAP_OUT:
                self.host[target] = block
                continue
            for offset, content in enumerate(block):
                slot = target * self.space.block_size + offset
                self.slots.pop(slot, None)
                if content is not None:
                    self.slots[slot] = content

    def _block(self, block: int) -> list[Content | None]:
        size = self.space.block_size
        return [self.slots.get(slot) for slot in range(block * size, (block + 1) * size)]

    def _write(self, request: Request, tokens: list[int], first: int, end: int) -> None:
        assert end <= len(tokens), "computes a token that does not exist yet"
        for position in range(first, end):
            if position >= request.num_tokens:
                assert self._sampled.get(request.row) == (request, position), (
                    "a token that the row does not have"
                )
            prefix = tuple(tokens[: position + 1])
            for group, table in enumerate(request.tables):
                assert table.ids[position // self.space.block_size] != 0, "writes to a hole"
                self.slots[table.slot(position)] = (group, request.cache_salt, prefix)

    def _read(self, request: Request, tokens: list[int], first: int, end: int) -> None:
        """Every token of the step reads what its window reaches, once all are written."""
        for group, window in enumerate(self.space.windows):
            begin = 0 if window is None else max(0, first - window + 1)
            self._check_slots(request, tokens, group, range(begin, end))

    def _check_slots(self, request: Request, tokens: list[int], group: int, positions: range) -> None:
        salt, table = request.cache_salt, request.tables[group]
        for position in positions:
            found = self.slots.get(table.slot(position))
            wanted = (group, salt, tuple(tokens[: position + 1]))
            assert found == wanted, f"{request}: position {position} holds {found}, not {wanted}"

    # What must hold whenever nothing is half done.

    def check(self) -> None:
        """What live requests will read is there; what can be found is what its key says."""
        for request in self.scheduler.requests():
            assert request.num_pending == len(self.pending.get(request, [])), "tokens on the way miscounted"
            tokens, end = self.tokens(request), request.num_computed_tokens
            for group, window in enumerate(self.space.windows):
                begin = 0 if window is None else max(0, end - window + 1)
                if request.host_tables is None:
                    self._check_slots(request, tokens, group, range(begin, end))
                else:
                    self._check_host_slots(request, request.host_tables[group], group, range(begin, end))
        self._check_cached()

    def _check_host_slots(self, request: Request, blocks: list[int], group: int, positions: range) -> None:
        tokens, size = self.tokens(request), self.space.block_size
        for position in positions:
            found = self.host[blocks[position // size]][position % size]
            wanted = (group, request.cache_salt, tuple(tokens[: position + 1]))
            assert found == wanted, f"{request}: swapped out, position {position} holds {found}, not {wanted}"

    def _check_cached(self) -> None:
        cache, tier = self.space.cache, self.space.host
        for block in range(1, self.space.num_blocks):
            key = cache.key_of(block)
            if key is not None:
                self._check_full(self._block(block), key, f"block {block}")
        for key, block in [] if tier is None else tier._cached.items():
            self._check_full(self.host[block], key, f"host block {block}")

    def _check_full(self, block: list[Content | None], key: bytes, name: str) -> None:
        last, size = block[-1], self.space.block_size
        assert last is not None, f"{name} is cached and was never filled"
        group, salt, prefix = last
        assert len(prefix) % size == 0, f"{name} is cached and holds another position's token"
        assert key_of(last, size) == key, f"{name} holds {last}, not what its key says"
        begins = [(group, salt, prefix[: len(prefix) - size + 1 + offset]) for offset in range(size)]
        assert block == begins, f"{name} is cached and holds {block}"

    # What happens to requests.

    def collected(self, request: Request) -> None:
        """The host has learnt the request's next token."""
        token = self.pending[request].pop(0)
        assert token == request.token_ids[-1], "another token than the device sampled"

    def lose(self) -> None:
        """The device lost everything, and so did the copies on their way to the host."""
        self.slots.clear()
        self.host.clear()
        self.pending.clear()
        self._sampled.clear()

    def forget(self, requests: Iterable[Request]) -> None:
        """These have finished."""
        for request in requests:
            assert request.status.is_finished
            assert not any(table.ids for table in request.tables), "a finished request keeps blocks"
            assert request.host_tables is None, "a finished request keeps host blocks"
            self.pending.pop(request, None)
