"""A conversation's row has the ids that transformers gives for the model's chat template, and the answers as labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from letters import wrote

from edge_agent.dataset import load_dataset, load_encoder
from edge_agent.dataset.preview import learnt_spans
from fedge.messages import Template
from quantize.chat import chat_format

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TALKS = [
    [("user", "hello there"), ("assistant", "I am fine, and you?")],
    [("user", "a\n\nb"), ("assistant", "\nc\n"), ("user", "Grüße 👋🏽"), ("assistant", "schön\u2028 ja")],
    [("user", " x "), ("assistant", "1234567890 12.5%"), ("user", "y"), ("assistant", "<|im_end|> inside")],
]


def checked(folder: Path, tokenizer: Path, template: str, tokens: dict[str, str], window: int) -> None:
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), **tokens)
    encode = load_encoder(tokenizer)
    chat = chat_format(template, tokens, tokenizer.read_bytes(), eos_id=0)
    assert chat is not None
    talks = [[{"role": role, "content": text} for role, text in talk] for talk in TALKS]
    path = wrote(folder, [{"messages": messages} for messages in talks])
    rows = load_dataset(path, Template(kind="chat"), encode, eos_id=0, window=window, chat=chat).rows
    assert len(rows) == len(talks)
    for messages, row in zip(talks, rows, strict=True):
        said = [
            {**m, "content": m["content"].strip()} if "outer-space" in chat.cannot else m for m in messages
        ]
        text: Any = reference.apply_chat_template(said, chat_template=template, tokenize=False)
        whole = reference(text, add_special_tokens=False)["input_ids"]
        ids = row.ids.tolist()
        assert ids == whole[: len(ids)]
        assert not reference.decode(whole[len(ids) :]).strip()  # nothing but the space behind the last answer
        answers = [m["content"] for m in said if m["role"] == "assistant"]
        learnt = [encode.decode(ids[start:end]) for start, end in learnt_spans(row)]
        assert len(learnt) == len(answers)
        for found, answer in zip(learnt, answers, strict=True):
            assert found.lstrip() == (chat.frames["assistant"].text(answer) + chat.end).lstrip()


@pytest.mark.parametrize("template", [CHATML, LLAMA2], ids=["chatml", "llama-2"])
def test_rows_have_the_reference_ids(tmp_path: Path, template: str) -> None:
    path = tmp_path / "tokenizer.json"
    tiny.write_tokenizer(path)
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<s>", "</s>")]
    )
    tokenizer.save(str(path))
    checked(tmp_path, path, template, {"bos_token": "<s>", "eos_token": "</s>"}, window=512)


@pytest.mark.real
def test_smollm2_learns_its_own_chat(tmp_path: Path) -> None:
    from gguf import GGUFReader

    from fedge.io.model_source import resolve_model
    from quantize.chat_template import tokens_in_gguf
    from quantize.tokenizer import from_gguf

    file = resolve_model("smollm2-135m").path
    assert file is not None
    fields = {name: value.contents() for name, value in GGUFReader(file).fields.items()}
    path = tmp_path / "tokenizer.json"
    path.write_bytes(from_gguf(fields))
    template, tokens = fields["tokenizer.chat_template"], tokens_in_gguf(fields)
    checked(tmp_path, path, template, tokens, window=256)
    chat = chat_format(template, tokens, path.read_bytes(), eos_id=2)
    assert chat is not None
    assert (chat.cannot, chat.end, chat.end_ids) == ({}, "<|im_end|>", (2,))
    assert json.loads(path.read_bytes())["added_tokens"][2]["content"] == "<|im_end|>"
