"""The text side of a request: what comes in pieces is what comes at once, up to the stop string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.runtime.engine.text import TextStream
from headwise.runtime.inputs.tokenizer import IncrementalDetokenizer
from tests.effort import examples
from tests.runtime.inputs.test_tokenizer import TINY, TOKENIZERS

BYTES = TOKENIZERS["byte_level"]


def stream(stop: list[str], include: bool = False, name: str = "byte_level") -> TextStream:
    return TextStream(IncrementalDetokenizer(TOKENIZERS[name]), stop, include)


def feed(text: TextStream, ids: list[int]) -> tuple[list[str], str | None]:
    """The pieces of tokens that come one by one, and the stop string that ended them."""
    pieces = []
    for token in ids:
        piece, stop = text.add([token])
        pieces.append(piece)
        if stop is not None:
            return pieces, stop
    piece, stop = text.flush()
    return [*pieces, piece], stop


@pytest.mark.parametrize("name", TINY)
@examples(300)
@given(ids=st.lists(st.integers(0, 280), max_size=50))
def test_pieces_of_any_tokens_join_to_their_text(name: str, ids: list[int]) -> None:
    pieces, stop = feed(stream([], name=name), ids)
    whole = TOKENIZERS[name].decode(ids)
    assert ("".join(pieces), stop) == (whole, None)
    # Never a character's first half and then its second: what is replaced in a piece is replaced in the whole.
    assert sum(piece.count("\ufffd") for piece in pieces) == whole.count("\ufffd")


@pytest.mark.parametrize("include", [False, True])
@examples(500)
@given(
    text=st.text(alphabet="ab 😀é", max_size=30),
    stops=st.lists(st.text(alphabet="ab 😀é", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_a_stop_string_ends_the_text_before_it(include: bool, text: str, stops: list[str]) -> None:
    pieces, found = feed(stream(stops, include), BYTES.encode(text))
    joined = "".join(pieces)
    if found is None:
        assert joined == text and not any(stop in text for stop in stops)
        return
    before = joined.removesuffix(found) if include else joined
    assert joined == before + (found if include else "")
    assert text.startswith(before + found)
    assert not any(stop in before for stop in stops)


@examples(300)
@given(ids=st.lists(st.integers(0, 260), max_size=40), data=st.data())
def test_a_stop_string_in_random_tokens_is_always_found(ids: list[int], data: st.DataObject) -> None:
    whole = BYTES.decode(ids)
    start = data.draw(st.integers(0, max(0, len(whole) - 1)))
    stop = whole[start : start + data.draw(st.integers(1, 5))] or "x"
    pieces, found = feed(stream([stop]), ids)
    at = whole.find(stop)
    assert (found, "".join(pieces)) == ((None, whole) if at < 0 else (stop, whole[:at]))


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    text = stream(["abc"])
    add = [text.add([i]) for i in BYTES.encode("xabab")]
    assert add == [("x", None), ("", None), ("", None), ("ab", None), ("", None)]
    assert text.add(BYTES.encode("c")) == ("", "abc")


def test_held_text_comes_out_at_the_end() -> None:
    text = stream(["abc"])
    assert text.add(BYTES.encode("xab")) == ("x", None)
    assert text.flush() == ("ab", None)
    assert text.flush() == ("", None)


def test_an_unfinished_character_may_complete_a_stop_string_at_the_end() -> None:
    first, *_ = BYTES.encode("😀")
    text = stream(["a\ufffd"])
    assert text.add([*BYTES.encode("xa"), first]) == ("x", None)
    assert text.flush() == ("", "a\ufffd")


def test_the_first_stop_string_wins_and_of_two_at_one_place_the_longer() -> None:
    assert stream(["cd", "ab"]).add(BYTES.encode("xabcd")) == ("x", "ab")
    assert stream(["a", "ab"]).add(BYTES.encode("xabcd")) == ("x", "ab")
    assert stream(["ab"], include=True).add(BYTES.encode("xabcd")) == ("xab", "ab")


def test_text_that_was_let_through_is_not_searched_again() -> None:
    text = stream(["ab"])
    assert text.add(BYTES.encode("ab a"), searching=False) == ("ab a", None)
    assert text.add(BYTES.encode("b ab")) == ("b ", "ab")
