"""A chat template becomes a table that writes what transformers writes, or says what it cannot (F15)."""

from __future__ import annotations

from typing import Any

import pytest
from chat_templates import CANNOT, CHATML, FAMILIES, SPECIAL
from hypothesis import given, settings
from hypothesis import strategies as some
from tokenizers import AddedToken, Tokenizer, models

from fedge.chat import SHAPES, ChatFormat, Said, check, shapes_of, write
from fedge.errors import DataError
from quantize.chat import chat_format
from quantize.chat_probes import conversations
from quantize.chat_template import ChatTemplate, template_in, tokens_in, tokens_in_gguf

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
EOS = SPECIAL.index("</s>")


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return made


def table(template: str) -> ChatFormat:
    chat = chat_format(template, TOKENS, tokenizer().to_str().encode(), EOS)
    assert chat is not None
    return chat


TABLES = {family: table(template) for family, template in FAMILIES.items()}


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer(), **TOKENS)


def applied(reference: Any, template: str, said: list[Said], ask: bool) -> str:
    messages = [{"role": role, "content": text} for role, text in said]
    text: str = reference.apply_chat_template(
        messages,
        chat_template=template,
        tokenize=False,
        add_generation_prompt=ask,
        date_string="26 Jul 2024",
    )
    return text


# ---------------------------------------------------------------- the table
@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_says_what_it_cannot_write(family: str) -> None:
    chat = TABLES[family]
    assert set(chat.cannot) == CANNOT[family]
    assert chat.probes >= 40
    assert all(chat.cannot.values())


TURNS = some.lists(
    some.tuples(
        some.sampled_from(["system", "user", "user", "assistant", "assistant", "tool"]),
        some.text(max_size=12)
        | some.sampled_from([" a", "b\n", "ü\u0301 👋🏽", "{{ x }}", "</s>", "[INST]", ""]),
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(said=TURNS, ask=some.booleans())
def test_what_is_written_is_what_transformers_writes(
    family: str, said: list[Said], ask: bool, reference: Any
) -> None:
    chat = TABLES[family]
    if any(shape in chat.cannot for shape in shapes_of(said)):
        with pytest.raises(DataError, match="chat template"):
            check(chat, said)
        return
    if said[-1][0] in ("user", "tool") or not ask:
        assert write(chat, said, ask=ask).text == applied(reference, FAMILIES[family], said, ask)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_begins_where_the_question_ends_and_ends_with_what_the_model_says(
    family: str, reference: Any
) -> None:
    """The learnt part goes on where a prompt would stop, so training and use see the same text."""
    chat, template = TABLES[family], FAMILIES[family]
    said = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    text, answers = write(chat, said)
    assert len(answers) == 2
    for (start, end), turns, word in zip(answers, (1, 3), ("two", "four"), strict=True):
        asked = applied(reference, template, said[:turns], ask=True)
        if turns == 3 or chat.last_answer is None:
            assert text[:start] == asked
        assert word in text[start:end]
        assert any(text[start:end].endswith(token) for token in SPECIAL)
        assert chat.end_ids == tuple(sorted({EOS, *ids_of(chat.end.strip())}))


def ids_of(token: str) -> list[int]:
    return [SPECIAL.index(token)]


def test_shapes_are_seen() -> None:
    seen = {shape for said in conversations() for shape in shapes_of(said)}
    assert seen == set(SHAPES)
    assert len(list(conversations())) >= 40


# ---------------------------------------------------------------- templates that no table can say
@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}",
        "{% for m in messages %}{{ messages | length }} {{ m.content }}\n{% endfor %}",
        "{{ raise_exception('never') }}",
        "{{ messages[0].nothing.here }}",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_a_template_that_is_no_table_is_told_and_not_approximated(template: str) -> None:
    chat = table(template)
    assert set(chat.cannot) == {"conversation"}
    with pytest.raises(DataError, match="user and assistant by turns"):
        check(chat, [("user", "a")])


def test_a_first_token_that_opens_every_turn_is_part_of_the_turns() -> None:
    """SmolLM2 names <|im_start|> as the token that begins a text."""
    tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    chat = chat_format(CHATML, tokens, tokenizer().to_str().encode(), SPECIAL.index("<|im_end|>"))
    assert chat is not None
    assert (chat.opening, chat.cannot) == ("", {})
    assert chat.frames["system"].prefix == "<|im_start|>system\n"


def test_a_template_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(DataError, match="chat template cannot be read"):
        ChatTemplate("{% for m in messages %}", TOKENS)
    assert "cannot be read" in table("{% for m in messages %}").cannot["conversation"]
    assert chat_format("", {}, b"", 0) is None


def test_the_gate_sees_a_table_that_is_off_by_a_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red once: a frame read off wrongly must not pass."""
    from quantize import chat as module

    whole = module._Reader.draft

    def spoilt(self: Any) -> ChatFormat:
        import msgspec

        draft = whole(self)
        frames = {**draft.frames, "user": msgspec.structs.replace(draft.frames["user"], suffix="<|im_end|>")}
        return msgspec.structs.replace(draft, frames=frames)

    monkeypatch.setattr(module._Reader, "draft", spoilt)
    assert "conversation" in table(CHATML).cannot


def test_the_date_does_not_change_a_bundle() -> None:
    dated = "{{ strftime_now('%Y') }}" + CHATML
    assert table(dated) == table(dated)
    assert "26 Jul 2024" in ChatTemplate(dated, TOKENS).write([("user", "a")])


def test_where_a_template_and_its_tokens_are_found(tmp_path: Any) -> None:
    named = {"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]}
    assert template_in(tmp_path, {"chat_template": "z"}) == "z"
    assert template_in(tmp_path, named) == "y"
    assert template_in(tmp_path, {}) == ""
    (tmp_path / "chat_template.jinja").write_text("file")
    assert template_in(tmp_path, named) == "file"
    gguf = {"tokenizer.ggml.tokens": ["a", "<s>", "</s>"], "tokenizer.ggml.bos_token_id": 1}
    assert tokens_in_gguf({**gguf, "tokenizer.ggml.eos_token_id": 2}) == TOKENS
    assert tokens_in({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}) == TOKENS
