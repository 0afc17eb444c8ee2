"""The one function from sizes to compiled shapes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpaged.buckets import bucket_for, rows_of, token_buckets

SIZES = st.integers(1, 20_000)


@given(SIZES, st.integers(1, 600))
def test_the_set_is_ascending_ends_at_the_limit_and_is_small(max_tokens: int, max_seqs: int) -> None:
    buckets = token_buckets(max_tokens, max_seqs)
    assert list(buckets) == sorted(set(buckets))
    assert buckets[0] == 1
    assert buckets[-1] == max_tokens
    assert len(buckets) <= 15 + 2 * max_tokens.bit_length()
    assert min(max_tokens, max_seqs) in buckets, "a full step of decode rows has a bucket of its own"


@given(SIZES, st.integers(1, 600), st.data())
def test_the_smallest_that_holds_it_and_little_padding(
    max_tokens: int, max_seqs: int, data: st.DataObject
) -> None:
    buckets = token_buckets(max_tokens, max_seqs)
    num_tokens = data.draw(st.integers(1, max_tokens))
    bucket = bucket_for(num_tokens, buckets)
    assert bucket == min(b for b in buckets if b >= num_tokens)
    assert bucket - num_tokens <= max(7, bucket / 3)


@pytest.mark.parametrize("num_tokens", [-1, 0, 129])
def test_no_bucket(num_tokens: int) -> None:
    with pytest.raises(ValueError, match=rf"num_tokens={num_tokens} is not in \[1, 128\]"):
        bucket_for(num_tokens, token_buckets(128, 8))


def test_rows() -> None:
    assert [rows_of(bucket, 16) for bucket in (1, 8, 16, 24, 512)] == [1, 8, 16, 16, 16]
