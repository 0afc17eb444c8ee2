"""What losing its blocks costs a request: the time to compute them again, or to carry them to the host and back."""

from dataclasses import dataclass

# The last ten observations or so make up an estimate.
DECAY = 0.9
# A single observation counts for at most this many times the estimate: a pause of the machine is no trend. A lasting
# change still arrives, since the bound moves with the estimate.
MAX_RATIO = 8.0
# Of the two ways only that back is waited for: on the way out the blocks are free as soon as they are gathered on
# the device, and their copy to the host runs beside the next steps.
EXPOSED_SHARE = 0.5


class PreemptionCost:
    """Chooses between recomputing and swapping for a request that has to give up its blocks.

    Recomputing costs ``num_tokens`` times the seconds a token that were seen in large steps; swapping costs
    ``EXPOSED_SHARE`` of two transfers of the blocks. Both rates are ratios of exponentially decayed sums (seconds
    over tokens, seconds over bytes), so a large observation counts for more than a small one and the first for
    no more than its share. The paper on PagedAttention describes both ways (arXiv:2309.06180, section 4.5) and found
    that block size and bandwidth decide which is better (section 7.3); so both are measured here.

    Before a transfer was seen, ``bytes_per_second`` is believed. Before a large step was seen, swapping is
    preferred: its cost is bounded by the bandwidth, that of computing is not known at all.

    Invariant (``check_invariants``): a rate is absent or not negative.

    Args:
      bytes_per_block: keys and values of one block in all layers.
      bytes_per_second: bandwidth between device and host until one was measured.
      min_step_tokens: steps of fewer tokens are no measure of what a prompt token costs, since a step of few tokens
        takes as long as reading the weights, however many they are. Arithmetic begins to bind where tokens exceed the
        device's FLOP/s over its bytes/s: 160 for an A100, 300 for an H100 in bfloat16, less for a CPU. At most
        ``max_num_batched_tokens``, or no step would count.
    """

    def __init__(
        self, bytes_per_block: int, *, bytes_per_second: float = 10e9, min_step_tokens: int = 256
    ) -> None:
        if bytes_per_block < 1 or bytes_per_second <= 0 or min_step_tokens < 1:
            raise ValueError(
                f"bytes_per_block={bytes_per_block}, bytes_per_second={bytes_per_second}, "
                f"min_step_tokens={min_step_tokens} must be positive"
            )
        self.bytes_per_block = bytes_per_block
        self.min_step_tokens = min_step_tokens
        self._prior_seconds_per_byte = 1 / bytes_per_second
        self._compute = _Rate()
        self._transfer = _Rate()

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """Notes what a step took; those of fewer than ``min_step_tokens`` are left out.

        The caller leaves out steps that compiled a program, whose time is not that of the step.
        """
        if num_tokens >= self.min_step_tokens:
            self._compute.observe(num_tokens, seconds)

    def observe_transfer(self, num_bytes: int, seconds: float) -> None:
        """Notes what a transfer took, in either direction."""
        if num_bytes > 0:
            self._transfer.observe(num_bytes, seconds)

    def seconds_to_recompute(self, num_tokens: int) -> float | None:
        """Of computing tokens again; None until a large step was seen."""
        per_token = self._compute.value
        return None if per_token is None else num_tokens * per_token

    def seconds_to_swap(self, num_blocks: int) -> float:
        """Of carrying blocks to the host and back, as far as it is waited for."""
        measured = self._transfer.value
        per_byte = self._prior_seconds_per_byte if measured is None else measured
        return EXPOSED_SHARE * 2 * num_blocks * self.bytes_per_block * per_byte

    def prefers_swap(self, num_blocks: int, num_tokens: int) -> bool:
        """Whether swapping a request is the cheaper way; when both cost the same, it is not.

        Args:
          num_blocks: blocks that would have to be carried.
          num_tokens: tokens that would have to be computed again, those not counted that would be found in the
            prefix cache.
        """
        if num_tokens <= 0:
            return False
        recompute = self.seconds_to_recompute(num_tokens)
        return recompute is None or self.seconds_to_swap(num_blocks) < recompute

    def check_invariants(self) -> None:
        """Asserts the invariant."""
        for rate in (self._compute, self._transfer):
            assert rate.value is None or rate.value >= 0, "a negative rate"


@dataclass
class _Rate:
    """Seconds a unit, as the ratio of two decayed sums."""

    seconds: float = 0.0
    units: float = 0.0

    @property
    def value(self) -> float | None:
        return self.seconds / self.units if self.units else None

    def observe(self, units: int, seconds: float) -> None:
        value = self.value
        if value:  # a rate of zero bounds nothing
            seconds = min(seconds, MAX_RATIO * value * units)
        self.seconds = DECAY * self.seconds + seconds
        self.units = DECAY * self.units + units
