"""Buckets: the padded shapes that have a compiled program, JAX's counterpart of CUDA graphs.

One function maps sizes to buckets for scheduler, batch builder, warm-up and tests. A bucket is a number of
tokens ``T``; the rows ``B`` of its batch follow from it, ``min(T, max_num_seqs)``, so a step of nothing but decode
rows and a step with prompts in it share their programs.
"""

from bisect import bisect_left


def token_buckets(max_num_batched_tokens: int, max_num_seqs: int) -> tuple[int, ...]:
    """All bucket sizes, ascending; the last one is ``max_num_batched_tokens``.

    1, 2, 4, then multiples of 8 up to 64 (or ``max_num_seqs`` if smaller), where most steps are and padding costs
    most in proportion, then two sizes an octave: at most a third of a step is padding.
    """
    sizes = {1, 2, 4, max_num_batched_tokens, min(max_num_seqs, max_num_batched_tokens)}
    fine_end = min(64, max_num_batched_tokens)
    sizes.update(range(8, fine_end + 1, 8))
    size = 64
    while size < max_num_batched_tokens:
        sizes.update((size, size + size // 2))
        size *= 2
    return tuple(sorted(s for s in sizes if s <= max_num_batched_tokens))


def bucket_for(num_tokens: int, buckets: tuple[int, ...]) -> int:
    """The smallest bucket that holds ``num_tokens``.

    Raises:
      ValueError: none does, or ``num_tokens`` is not positive.
    """
    if not 1 <= num_tokens <= buckets[-1]:
        raise ValueError(f"num_tokens={num_tokens} is not in [1, {buckets[-1]}]")
    return buckets[bisect_left(buckets, num_tokens)]


def rows_of(bucket: int, max_num_seqs: int) -> int:
    """Rows ``B`` of a bucket's batch: a step of ``T`` tokens has at most ``T`` sequences."""
    return min(bucket, max_num_seqs)


# A batch of more rows keeps the device busy long enough for the host's work not to show.
MAX_MULTI_STEP_ROWS = 8


def programs_of(
    buckets: tuple[int, ...], max_num_seqs: int, num_scheduler_steps: int
) -> list[tuple[int, int]]:
    """Every program there is, as (bucket, number of steps)."""
    programs = [(bucket, 1) for bucket in buckets]
    if num_scheduler_steps > 1:
        # Nothing but decode rows: a larger bucket than that of all sequences is never taken.
        largest = min(MAX_MULTI_STEP_ROWS, max_num_seqs)
        programs += [(bucket, num_scheduler_steps) for bucket in buckets if bucket <= largest]
    return programs
