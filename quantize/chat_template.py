"""A model's chat template, run where models are prepared and nowhere else: in Jinja's sandbox, without files or clock.

The environment is that of transformers' `apply_chat_template` (blocks trimmed, loop controls, `raise_exception`,
`tojson`), so that the text is the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fedge.chat import Said
from fedge.errors import DataError

TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# For templates that cannot do without today's: a bundle is the same whenever it is made.
_DATE: Final = "26 Jul 2024"


class TemplateRefused(Exception):
    """The template itself will not write this conversation."""


class _Generation(Extension):
    """`{% generation %}` marks what an assistant says; it changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A Jinja chat template with the special tokens that it names."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = _tojson
        self._tokens = dict(tokens)
        self._dated: dict[str, Any] = {}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template cannot be read: {error}", field="chat_template") from error

    def write(self, said: Sequence[Said], *, ask: bool = False) -> str:
        """The conversation as the template writes it. Raises TemplateRefused."""
        messages = [{"role": role, "content": text} for role, text in said]
        try:
            return self._run(messages, ask)
        except jinja2.UndefinedError as error:
            if "strftime_now" not in str(error):
                raise TemplateRefused(str(error)) from error
            self._dated = {"strftime_now": lambda form: _DATE}
            return self.write(said, ask=ask)
        except TemplateRefused:
            raise
        except Exception as error:  # a template may fail in any way that Python can
            raise TemplateRefused(str(error).split("\n")[0][:160]) from error

    def _run(self, messages: list[dict[str, str]], ask: bool) -> str:
        return self._template.render(
            messages=messages,
            add_generation_prompt=ask,
            tools=None,
            documents=None,
            **self._tokens,
            **self._dated,
        )


def _refuse(message: str) -> NoReturn:
    raise TemplateRefused(f"the model's template says: {message}")


def _tojson(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


# ---------------------------------------------------------------- where a template is found
def template_in(folder: Path, config: Mapping[str, Any]) -> str:
    """The chat template of a model folder, "" when there is none. `config` is its tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else ""


def tokens_in_gguf(fields: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens of a GGUF's metadata by name."""
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    pieces = fields.get("tokenizer.ggml.tokens", ())
    found = {}
    for word, name in names.items():
        number = fields.get(f"tokenizer.ggml.{word}_token_id")
        if isinstance(number, int) and 0 <= number < len(pieces):
            found[name] = str(pieces[number])
    return found


def tokens_in(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens of a tokenizer_config.json by name."""
    found = {}
    for name in TOKENS:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found
