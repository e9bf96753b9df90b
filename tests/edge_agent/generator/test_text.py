"""Tokens to text as they come: joined pieces are the whole text, no piece splits a character, stops are not shown."""

from pathlib import Path

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.generator.text import Detokenizer, StopStrings


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """Byte-level: every byte is a token, so a character may be four of them."""
    from tokenizers import Tokenizer

    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tiny.write_tokenizer(path)
    return Tokenizer.from_file(str(path))


@given(text=st.text(max_size=40))
def test_pieces_joined_are_the_text_and_none_ends_within_a_character(tokenizer, text: str):
    words = Detokenizer(tokenizer.decode)
    pieces = [words.push(token) for token in tokenizer.encode(text).ids]
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + words.finish() == text


def test_a_character_of_four_bytes_comes_with_its_last(tokenizer):
    ids = tokenizer.encode("🦔").ids
    words = Detokenizer(tokenizer.decode)
    assert len(ids) == 4
    assert [words.push(token) for token in ids] == ["", "", "", "🦔"]


def test_bytes_that_are_no_character_do_not_wait_for_ever(tokenizer):
    lone = tokenizer.encode("🦔").ids[:1]
    words = Detokenizer(tokenizer.decode)
    pieces = [words.push(token) for token in lone * 20]
    assert any(pieces)
    assert ("".join(pieces) + words.finish()).count("\ufffd") == 20


def test_the_first_token_keeps_its_space_after_a_prompt():
    """A word-piece decoder drops the space of a text's first token, but not of one that follows a prompt."""

    def decode(ids: list[int]) -> str:
        return "".join({0: " hello", 1: " world"}[i] for i in ids).lstrip()

    words = Detokenizer(decode, before=[0])
    assert words.push(1) == " world"
    assert Detokenizer(decode).push(1) == "world"


@given(
    text=st.text("abx", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 4), max_size=30),
)
def test_what_is_shown_is_the_text_up_to_the_first_stop_string(text: str, stops: list[str], cuts: list[int]):
    watch, shown, rest = StopStrings(stops), "", text
    for cut in [*cuts, len(text) or 1]:
        shown += watch.push(rest[:cut])
        assert not any(stop in shown for stop in stops)
        rest = rest[cut:]
    if watch.met is None:
        shown += watch.finish()
        assert shown == text
        assert not any(stop in text for stop in stops)
    else:
        assert text.startswith(shown + watch.met)


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_decided():
    watch = StopStrings(["\nMe:"])
    assert [watch.push(piece) for piece in ("Hi", "\n", "Me", "\nM", "e", ": x")] == [
        "Hi",
        "",
        "",
        "\nMe",
        "",
        "",
    ]
    assert watch.met == "\nMe:"


def test_the_earliest_of_several_stop_strings_counts():
    watch = StopStrings(["zzz", "b", "ab"])
    assert watch.push("xxabzzz") == "xx"
    assert watch.met == "ab"
