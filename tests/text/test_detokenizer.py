"""Text that arrives token by token is the text of all tokens, and no piece is shown too early."""

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxpaged.detokenizer import IncrementalDetokenizer
from jaxpaged.sampling_params import SamplingParams
from tests.text.tokenizers_made_here import byte_fallback, byte_level, wordpiece

BYTE_LEVEL_SIZE = byte_level().vocab_size
token_lists = st.lists(st.integers(0, BYTE_LEVEL_SIZE + 2), max_size=40)


def streamed(detokenizer: IncrementalDetokenizer, token_ids: list[int]) -> list[str]:
    """The pieces of ``append``, then that of ``flush``; ``text`` is looked at on the way."""
    pieces = []
    for token_id in token_ids:
        pieces.append(detokenizer.append(token_id))
        assert detokenizer.text == "".join(pieces)
    pieces.append(detokenizer.flush())
    assert detokenizer.text == "".join(pieces)
    assert detokenizer.flush() == ""
    return pieces


def bytes_to_ids(text: bytes) -> list[int]:
    """One token per byte: every character of several bytes is split over tokens."""
    by_bytes = {byte_level().token_bytes(token_id): token_id for token_id in range(BYTE_LEVEL_SIZE)}
    return [by_bytes[bytes([byte])] for byte in text]


@given(token_lists, st.booleans())
def test_byte_level_pieces_make_the_full_text(token_ids: list[int], skip: bool) -> None:
    params = SamplingParams(skip_special_tokens=skip)
    pieces = streamed(IncrementalDetokenizer(byte_level(), [5, 6], params), token_ids)
    assert "".join(pieces) == byte_level().decode(token_ids, skip_special_tokens=skip)


@given(st.binary(max_size=30))
@example(b"\xf0\x9f\x98")
@example(b"\xf0\x9f\x98A\xed\xa0\x80\xff")
@example("😀é日".encode() + b"\xe6\x97")
def test_any_bytes_even_broken_ones(text: bytes) -> None:
    pieces = streamed(IncrementalDetokenizer(byte_level(), [], SamplingParams()), bytes_to_ids(text))
    assert "".join(pieces) == text.decode(errors="replace") == byte_level().decode(bytes_to_ids(text))


@given(st.text(max_size=20))
def test_no_piece_shows_a_character_half_way(text: str) -> None:
    text = text.encode(errors="ignore").decode().replace("\ufffd", "")
    pieces = streamed(IncrementalDetokenizer(byte_level(), [], SamplingParams()), bytes_to_ids(text.encode()))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_special_tokens_in_the_middle() -> None:
    ids = byte_level().encode("the cat", add_special_tokens=False)
    end = byte_level().encode("<|im｜end|>", add_special_tokens=False)
    skipped = IncrementalDetokenizer(byte_level(), [], SamplingParams())
    shown = IncrementalDetokenizer(byte_level(), [], SamplingParams(skip_special_tokens=False))
    assert "".join(streamed(skipped, ids + end + ids)) == "the catthe cat"
    assert "".join(streamed(shown, ids + end + ids)) == "the cat<|im｜end|>the cat"


@given(st.lists(st.integers(0, 8), max_size=20))
def test_pieces_joined_by_spaces(token_ids: list[int]) -> None:
    prompt = [1, 2]
    pieces = streamed(IncrementalDetokenizer(wordpiece(), prompt, SamplingParams()), token_ids)
    whole = wordpiece().decode(prompt + token_ids)
    assert "the cat" + "".join(pieces) == whole


@given(st.lists(st.sampled_from(["the", " cat", "日本", "é", "😀", "a", "b."]), max_size=12))
def test_byte_fallback_pieces_make_the_full_text(words: list[str]) -> None:
    ids = byte_fallback_ids("".join(words))
    prompt = byte_fallback_ids(" the")
    pieces = streamed(IncrementalDetokenizer(byte_fallback(), prompt, SamplingParams()), ids)
    assert "".join(pieces) == "".join(words)
    assert not any("\ufffd" in piece for piece in pieces)


def byte_fallback_ids(text: str) -> list[int]:
    return [3 + byte for byte in text.encode()]


def test_byte_fallback_keeps_leading_spaces_and_broken_ends() -> None:
    tokenizer = byte_fallback()
    cat = tokenizer._backend.token_to_id("▁cat")
    detokenizer = IncrementalDetokenizer(tokenizer, [cat], SamplingParams())
    assert detokenizer.append(cat) == " cat"
    assert detokenizer.append(1) == ""  # special, skipped
    assert detokenizer.append(3 + 0xF0) == ""
    assert detokenizer.append(3 + 0x9F) == ""
    assert detokenizer.flush() == "\ufffd\ufffd"


def test_endless_broken_bytes_are_shown_in_linear_time() -> None:
    for tokenizer, broken in ((byte_fallback(), [3 + 0xFF]), (byte_level(), bytes_to_ids(b"\xff"))):
        detokenizer = IncrementalDetokenizer(tokenizer, [], SamplingParams())
        pieces = streamed(detokenizer, broken * 500)
        assert "".join(pieces) == "\ufffd" * 500


def seconds(num_tokens: int) -> float:
    ids = byte_level().encode("the cat sat 😀 on the mat", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(byte_level(), ids, SamplingParams(stop=["never", "seen"]))
    start = time.process_time()
    for place in range(num_tokens):
        detokenizer.append(ids[place % len(ids)])
    return time.process_time() - start


def test_time_is_linear() -> None:
    short = min(seconds(2_000) for _ in range(5))
    assert min(seconds(20_000) for _ in range(3)) < 30 * short


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4),
    st.booleans(),
    st.data(),
)
def test_stop_strings_wherever_tokens_end(
    text: str, stops: list[str], include: bool, data: st.DataObject
) -> None:
    params = SamplingParams(stop=stops, include_stop_str_in_output=include)
    # Straight: the first end of any stop string, and the longest that ends there.
    ends = [end for end in range(len(text) + 1) for stop in stops if text[:end].endswith(stop)]
    stop = max((s for s in stops if text[: min(ends)].endswith(s)), key=len) if ends else None
    expected = text if stop is None else text[: min(ends)] if include else text[: min(ends) - len(stop)]

    detokenizer = IncrementalDetokenizer(byte_level(), [], params)
    ids = bytes_to_ids(text.encode())
    pieces = []
    for token_id in ids:
        pieces.append(detokenizer.append(token_id))
        assert expected.startswith("".join(pieces))  # nothing shown is ever taken back
    pieces.append(detokenizer.flush())
    assert "".join(pieces) == detokenizer.text == expected
    assert detokenizer.check_stop() == stop
    assert detokenizer.append(ids[0] if ids else 0) == "" if stop else True


def test_text_is_held_back_only_while_it_may_be_a_stop_string() -> None:
    detokenizer = IncrementalDetokenizer(byte_level(), [], SamplingParams(stop="cab"))
    assert [detokenizer.append(token_id) for token_id in bytes_to_ids(b"accaxcab")] == [
        "a",
        "",
        "c",
        "",
        "cax",
        "",
        "",
        "",
    ]
    assert detokenizer.check_stop() == "cab"


def test_stop_strings_wait_for_min_tokens() -> None:
    params = SamplingParams(stop="ab", min_tokens=3, max_tokens=9)
    detokenizer = IncrementalDetokenizer(byte_level(), [], params)
    assert "".join(detokenizer.append(token_id) for token_id in bytes_to_ids(b"abxabx")) == "abx"
    assert detokenizer.check_stop() == "ab"
    late = IncrementalDetokenizer(byte_level(), [], SamplingParams(stop="xab", min_tokens=3, max_tokens=9))
    assert "".join(late.append(token_id) for token_id in bytes_to_ids(b"xxabb")) == "x"


def test_many_long_stop_strings_are_cheap() -> None:
    stops = ["ab" * 60 + chr(0x4E00 + place) for place in range(64)]
    detokenizer = IncrementalDetokenizer(byte_level(), [], SamplingParams(stop=stops))
    ids = bytes_to_ids(b"ab" * 5000)
    start = time.process_time()
    shown = sum(len(detokenizer.append(token_id)) for token_id in ids)
    assert time.process_time() - start < 1.0
    assert shown >= 10_000 - 121
    detokenizer.flush()
    assert detokenizer.text == "ab" * 5000


@pytest.mark.parametrize("tokenizer", [None, byte_level()])
def test_no_text_without_tokenizer_or_detokenize(tokenizer: object) -> None:
    params = SamplingParams(detokenize=False) if tokenizer else SamplingParams()
    detokenizer = IncrementalDetokenizer(tokenizer, [], params)
    assert detokenizer.append(3) == detokenizer.flush() == detokenizer.text == ""
    assert detokenizer.check_stop() is None
