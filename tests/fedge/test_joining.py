"""Join tokens: one printable word that reads back, and no other text that does."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.errors import ProtocolError
from fedge.joining import JoinToken

TOKEN = JoinToken("https://hub.local:8443", bytes(range(32)), bytes(range(20)))

tokens = st.builds(
    JoinToken,
    st.text(st.characters(codec="utf-8"), max_size=128),
    st.binary(min_size=32, max_size=32),
    st.binary(min_size=20, max_size=20),
)


def refused(text: str) -> None:
    with pytest.raises(ProtocolError) as refusal:
        JoinToken.parse(text)
    assert refusal.value.name == "bad-token"
    assert "fedge hub token" in refusal.value.hint


@given(token=tokens)
def test_parsing_undoes_writing(token: JoinToken) -> None:
    word = token.text()
    assert JoinToken.parse(word) == token
    assert JoinToken.parse(f"  {word}\n") == token
    assert word.isascii()
    assert not set(word) & set(" \t\n'\"$&|;<>\\`*?="), "safe to paste into a shell"


def test_a_token_fits_one_line() -> None:
    assert len(TOKEN.text()) < 160


@given(text=st.text(max_size=200))
@settings(max_examples=200)
def test_any_text_is_a_token_or_is_refused(text: str) -> None:
    for candidate in (text, "fedge1." + text):
        try:
            token = JoinToken.parse(candidate)
        except ProtocolError:
            continue
        assert isinstance(token, JoinToken)


@pytest.mark.parametrize("cut", range(len(TOKEN.text())))
def test_a_token_that_was_cut_short(cut: int) -> None:
    refused(TOKEN.text()[:cut])


def test_a_token_of_another_version_or_without_one() -> None:
    refused(TOKEN.text().replace("fedge1.", "fedge2."))
    refused(TOKEN.text().removeprefix("fedge1."))
    refused(TOKEN.text() + "AAAA")
