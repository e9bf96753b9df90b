"""`fedge agent generate` and `fedge agent chat`: what the model on this device writes, with an adapter or without.

The text goes to standard output as it comes, everything about it to standard error. Ctrl-C ends an answer, and
between answers the conversation.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from edge_agent.generator import Generator, Request, Stream
    from fedge.chat import ChatFormat, Said

_INTERRUPTED: Final = 130  # what a shell says of a program that Ctrl-C ended


def add_generate(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the words `generate` and `chat`."""
    generate = words.add_parser(
        "generate",
        help="write on after a prompt, with the model of a bundle",
        description="Writes on after a prompt, token by token. Greedy unless --temperature is given.",
    )
    generate.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder from `fedge quantize`")
    generate.add_argument("prompt", metavar="PROMPT", help="the text to go on from; - reads standard input")
    generate.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is what a user says: write it as the model's template does",
    )
    generate.add_argument("--json", action="store_true", help="as one JSON object, when all is written")
    _add_choices(generate)
    generate.set_defaults(run=_generate)
    chat = words.add_parser(
        "chat",
        help="talk with the model of a bundle",
        description="Talks with the model. A line is a turn; an empty line or the end of input ends the conversation, "
        "Ctrl-C ends an answer. What no longer fits the model is forgotten from the beginning.",
    )
    chat.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder from `fedge quantize`")
    chat.add_argument("--system", default="", metavar="TEXT", help="what the model is told first")
    chat.add_argument(
        "--plain", action="store_true", help="as lines of Friend and Me, as fleets train without --chat"
    )
    _add_choices(chat)
    chat.set_defaults(run=_chat, json=False)


def _add_choices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        type=Path,
        metavar="ADAPTER",
        help="a file of `train-once`, `personalise` or `adapter`, or a PEFT folder",
    )
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="(128)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (0)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="of the likely tokens' mass (1)"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="of the likely tokens, 0 = all (0)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="1 is none (1)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this; repeatable"
    )
    parser.add_argument(
        "--long",
        choices=("refuse", "cut"),
        default="refuse",
        help="what to do with too long a prompt (refuse)",
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="(default: all it may use)")


def _generate(arguments: argparse.Namespace) -> int:
    import msgspec

    from fedge import chat

    text = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    request = _request(arguments)
    generator, table = _open(arguments)
    prompt: str | list[int] = text
    if arguments.chat:
        asked = _require_chat(table)
        prompt = generator.encoder(chat.write(asked, [("user", text)], ask=True).text)
        request = _until(request, asked)
    stream = generator.stream(prompt, request)
    if stream.cut:
        _say(f"the first {stream.cut} tokens of the prompt were cut off")
    interrupted = _print(stream, quiet=arguments.json)
    if arguments.json:
        found = {
            "text": stream.text,
            "ending": "interrupted" if interrupted else stream.ending,
            "prompt_tokens": len(stream.prompt),
            "cut_tokens": stream.cut,
            "tokens": len(stream.ids),
        }
        print(msgspec.json.encode(found).decode())
    elif stream.ending is not None:
        _say(f"{len(stream.ids)} tokens, {stream.ending}")
    return _INTERRUPTED if interrupted else 0


def _chat(arguments: argparse.Namespace) -> int:
    request = _request(arguments)
    generator, table = _open(arguments)
    said: list[Said] = [("system", arguments.system)] if arguments.system else []
    chat = None if arguments.plain else table
    if chat is None and arguments.system:
        from fedge.errors import UsageError

        raise UsageError(
            "this model has no place for a system's text", field="system", value=arguments.system
        )
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            line = ""
        if not line:
            return 0
        said.append(("user", line))
        stream = _turn(generator, chat, said, request)
        _print(stream, quiet=False)
        said.append(("assistant", stream.text.strip()))


def _turn(generator: Generator, chat: ChatFormat | None, said: list[Said], request: Request) -> Stream:
    """The answer to the last of `said`. The oldest turns are dropped from it until an answer has room."""
    room = generator.decoding.positions_max - min(request.max_tokens, generator.decoding.positions_max // 2)
    request = _until(request, chat)
    while True:
        ids = generator.encoder(_written(chat, said))
        first = 1 if said[0][0] == "system" else 0
        if len(ids) <= room or len(said) - first < 3:
            return generator.stream(ids, request)
        del said[first : first + 2]
        _say("the oldest turns no longer fit and are forgotten")


def _written(chat: ChatFormat | None, said: list[Said]) -> str:
    """The conversation as text that ends where the model answers."""
    from fedge import chat as writing
    from fedge.messages import Template

    if chat is not None:
        return writing.write(chat, said, ask=True).text
    template, pieces = Template(), list[str]()
    for role, text in said:
        if role == "user":
            pieces.append(("\n" if pieces else "") + template.prompt.format(prompt=text))
        else:
            pieces.append(template.completion.format(completion=text))
    return "".join(pieces)


def _until(request: Request, chat: ChatFormat | None) -> Request:
    """The request, ended also where an answer in this chat ends."""
    import dataclasses

    if chat is not None:
        return dataclasses.replace(request, stop_ids=chat.end_ids)
    return dataclasses.replace(request, stop=(*request.stop, "\nFriend:", "\nMe:"))


def _request(arguments: argparse.Namespace) -> Request:
    from edge_agent.generator import Request, Sampling

    sampling = Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
    )
    return Request(sampling, arguments.max_tokens, tuple(arguments.stop), long=arguments.long)


def _open(arguments: argparse.Namespace) -> tuple[Generator, ChatFormat | None]:
    from edge_agent.bundle import open_bundle
    from edge_agent.generator import Generator, adapter_feeds
    from edge_agent.resources import threads_allowed
    from fedge.io.adapter_source import adapter_for
    from fedge.release import WEIGHTS

    bundle = open_bundle(arguments.bundle)
    feeds = None
    if arguments.adapter is not None:
        adapter = adapter_for(arguments.adapter, bundle.manifest, bundle.folder / WEIGHTS)
        feeds = adapter_feeds(bundle.layout, adapter.tensors, adapter.header.layout)
    threads = threads_allowed(arguments.threads)
    return Generator(bundle, threads=threads, adapter=feeds), bundle.manifest.chat


def _require_chat(table: ChatFormat | None) -> ChatFormat:
    from fedge.errors import UsageError

    if table is None:
        raise UsageError(
            "the model of this bundle has no chat template", field="chat", hint="Leave --chat out"
        )
    return table


def _print(stream: Stream, *, quiet: bool) -> bool:
    """Write the text as it comes; whether Ctrl-C ended it."""
    interrupted = False
    try:
        for piece in stream:
            if not quiet:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    if not quiet:
        print(flush=True)
    return interrupted


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
