"""What every block of the pool was at every step: one byte each, for plots and for looking back."""

from collections.abc import Collection
from itertools import repeat

from jaxpaged.block_allocator import DUMMY_BLOCK, BlockAllocator
from jaxpaged.errors import InvalidRequestError
from jaxpaged.prefix_cache import PrefixCache

FREE = 0  # nobody holds it, nothing in it is of use
CACHED = 1  # nobody holds it, but a prefix in it can be found and revived
LIVE = 2  # one holder
SHARED = 3  # several holders
PINNED = 4  # holds a prefix that is kept for later requests
SWAPPING = 5  # on its way to or from the host
DUMMY = 6  # where padding writes to
STATE_NAMES = ("free", "cached", "live", "shared", "pinned", "swapping", "dummy")
_STATE_OF_COUNT = bytes([FREE, LIVE] + [SHARED] * 254)


def block_states(
    allocator: BlockAllocator,
    cache: PrefixCache,
    pinned: Collection[int] = frozenset(),
    swapping: Collection[int] = frozenset(),
) -> bytes:
    """The state of each block, one byte a block, in the order of their ids.

    Where several would do, the last of them in the list above is taken: a pinned block that a request holds as
    well is ``PINNED``. Takes 0.01 to 0.03 microseconds a block.
    """
    counts = allocator.counts
    try:
        states = bytearray(bytes(counts).translate(_STATE_OF_COUNT))
    except ValueError:  # more holders than a byte can count
        states = bytearray(bytes(map(min, counts, repeat(2))).translate(_STATE_OF_COUNT))
    for block in cache.blocks:
        if not states[block]:
            states[block] = CACHED
    for block in pinned:
        states[block] = PINNED
    for block in swapping:
        states[block] = SWAPPING
    states[DUMMY_BLOCK] = DUMMY
    return bytes(states)


class BlockTrace:
    """States of all blocks over a run, in bounded memory: at most ``max_steps * num_blocks`` bytes.

    When ``max_steps`` samples are there and another comes, every second one is dropped, and from then on only
    every second call is kept. So a long run stays whole from its first step on, at half the resolution, then at
    a quarter.

    Invariants (``check_invariants``): samples are ``num_blocks`` bytes of known states, at most ``max_steps`` of
    them, at ascending steps; kept are the calls whose number is a multiple of ``stride``, a power of two.

    Args:
      num_blocks: blocks of the pool, the dummy included.
      max_steps: samples to keep; at least 2.

    Raises:
      InvalidRequestError: ``max_steps`` is no integer of at least 2.
    """

    def __init__(self, num_blocks: int, max_steps: int = 2000) -> None:
        assert num_blocks >= 1, "a pool without blocks"
        if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 2:
            raise InvalidRequestError("max_steps", max_steps, "must be an integer of at least 2")
        self.num_blocks = num_blocks
        self.max_steps = max_steps
        self.stride = 1
        self._num_calls = 0
        self._steps: list[int] = []
        self._samples: list[bytes] = []

    def __len__(self) -> int:
        return len(self._samples)

    def __repr__(self) -> str:
        return f"BlockTrace({len(self)} samples of {self.num_blocks} blocks, stride={self.stride})"

    @property
    def steps(self) -> list[int]:
        """The number of the step each sample was taken at, ascending."""
        return list(self._steps)

    @property
    def samples(self) -> list[bytes]:
        """One byte a block for each kept step; the constants of this module."""
        return list(self._samples)

    def record(self, step: int, states: bytes) -> None:
        """Takes the states after a step, and keeps them if it is this step's turn.

        The same step again, as after one that failed and counts for nothing, replaces what was kept of it.
        """
        if self._is_due(step):
            self._keep(step, states)

    def observe(
        self,
        step: int,
        allocator: BlockAllocator,
        cache: PrefixCache,
        pinned: Collection[int] = frozenset(),
        swapping: Collection[int] = frozenset(),
    ) -> None:
        """As ``record`` of their ``block_states``, which are not computed where they would not be kept."""
        if self._is_due(step):
            self._keep(step, block_states(allocator, cache, pinned, swapping))

    def _is_due(self, step: int) -> bool:
        """Counts a call and makes room for its sample; whether it is to be kept."""
        if self._steps and step == self._steps[-1]:
            self._steps.pop()
            self._samples.pop()
            return True
        call = self._num_calls
        self._num_calls += 1
        if call % self.stride:
            return False
        if len(self._samples) == self.max_steps:
            del self._samples[1::2], self._steps[1::2]
            self.stride *= 2
        return call % self.stride == 0

    def _keep(self, step: int, states: bytes) -> None:
        assert len(states) == self.num_blocks, "one byte for each block"
        assert not self._steps or step > self._steps[-1], "steps do not go back"
        self._steps.append(step)
        self._samples.append(bytes(states))

    def check_invariants(self) -> None:
        """Asserts the invariants."""
        assert len(self._samples) == len(self._steps) <= self.max_steps, "too many samples"
        assert len(self._samples) == -(-self._num_calls // self.stride), "a sample is lost"
        assert self.stride & (self.stride - 1) == 0, "the stride is no power of two"
        assert sorted(set(self._steps)) == self._steps, "steps do not ascend"
        assert all(len(sample) == self.num_blocks for sample in self._samples), "a sample of another size"
        assert all(max(sample) < len(STATE_NAMES) for sample in self._samples), "an unknown state"
