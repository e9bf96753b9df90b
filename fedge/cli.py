"""The `fedge` command: finds the word, loads its room and no other, and turns every failure into one line.

A room adds words by `register(subparsers)`: it only builds parsers, and each leaf sets `run`, a function that takes
the parsed arguments and returns an exit code or None for 0. Nothing heavy is imported before a `run` is called:
`fedge --version` costs 20 ms of CPU; numpy alone would cost 115.

Our own words stand in a literal table, because asking `importlib.metadata` for them costs as much as everything else
together; it is asked only for words that other distributions add to the entry-point group `fedge.commands`.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple, NoReturn

from fedge import __version__
from fedge.errors import FedgeError, NoInputError, StorageError, UnavailableError, UsageError

GROUP: Final = "fedge.commands"
BUG_CODE: Final = FedgeError.exit_code
INTERRUPTED_CODE: Final = 130  # 128 + SIGINT, as shells have it
BROKEN_PIPE_CODE: Final = 141  # 128 + SIGPIPE

_DISK: Final = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EISDIR,
    errno.ENOTDIR,
)
_NETWORK: Final = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL)

Register = Callable[["argparse._SubParsersAction[argparse.ArgumentParser]"], None]


class Command(NamedTuple):
    """A word of the command line: where its parsers are built, and what brings it when it is missing."""

    word: str
    target: str  # "module:function"
    about: str
    needs: tuple[str, ...] = ()  # distributions' top-level modules beyond the base install
    extra: str = ""


COMMANDS: Final = (
    Command(
        "sim",
        "firmware_sim.cli:register",
        "a whole fleet on this machine: real model, real broker, real cryptography",
        ("torch", "sqlalchemy"),
        "sim",
    ),
    Command(
        "quantize",
        "quantize.cli:register",
        "turn a model folder, a GGUF or a hub id into a signed device bundle",
        ("torch", "transformers", "onnx"),
        "quantize",
    ),
    Command(
        "hub",
        "hub.cli:register",
        "the server: broker, rounds, aggregation, adapters",
        ("sqlalchemy", "starlette"),
        "hub",
    ),
    Command("agent", "edge_agent.cli:register", "the device: join a fleet and train on private data"),
    Command("bundle", "edge_agent.bundle_cli:register", "show, verify and plan for a bundle"),
    Command(
        "adapter",
        "quantize.adapter_cli:register",
        "show, compare, export and merge adapters: PEFT, GGUF, Hugging Face",
        extra="quantize",
    ),
    Command("models", "fedge.assets_cli:register", "models that can be fetched by name"),
    Command("data", "fedge.assets_cli:register", "data sets that can be fetched by name"),
)

_FIRST_STEPS: Final = """\
first steps:
  fedge sim demo                 16 devices fine-tune a 4-bit language model on real people's messages
  fedge models list              models that can be fetched by name
  fedge quantize MODEL --out DIR prepare a model of your own
  fedge COMMAND --help           what a command takes, with examples

Every failure is one line on standard error and an exit code (docs/exit-codes.md); --debug shows the trace.
"""


class Parser(argparse.ArgumentParser):
    """argparse, except that a wrong word is a UsageError (exit 64) like any other of ours. Sub-parsers inherit it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"`{self.prog} --help` shows what it takes")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()  # here a closed pipe can still be caught
        super().exit(status, message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Never lets a traceback out unless `--debug` is given."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = _take_debug(words)
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _fail("stopped", INTERRUPTED_CODE)
    except BrokenPipeError:
        # The reader has gone; without this the interpreter complains again while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE_CODE
    except Exception as error:
        if debug:
            raise
        return _explain(error, words[0] if words else "")


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_help_text(), end="")
        return 0
    if words[0] == "--version":
        print(f"fedge {__version__}")
        return 0
    parser = _root_parser()
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _find(words[0])(subparsers)
    arguments = parser.parse_args(words)
    run: Callable[[argparse.Namespace], int | None] | None = getattr(arguments, "run", None)
    if run is None:  # `fedge hub` alone
        parser.parse_args([words[0], "--help"])
        raise UsageError("a command is missing", field="command", value=words[0])
    return run(arguments) or 0


def _root_parser() -> argparse.ArgumentParser:
    return Parser(prog="fedge")


def _find(word: str) -> Register:
    """The function that builds the parsers of `word`. Raises UsageError or UnavailableError."""
    for command in COMMANDS:
        if command.word == word:
            return _load(command.target)
    for name, target in _foreign():
        if name == word:
            return _load(target)
    import difflib

    close = difflib.get_close_matches(word, [command.word for command in COMMANDS], n=1)
    hint = f"Did you mean `fedge {close[0]}`?" if close else "`fedge --help` lists the commands"
    raise UsageError("no such command", field="command", value=word, hint=hint)


def _load(target: str) -> Register:
    module, _, function = target.partition(":")
    register: Register = getattr(importlib.import_module(module), function)
    return register


def _foreign() -> Iterator[tuple[str, str]]:
    """Words that other distributions bring."""
    from importlib.metadata import entry_points

    ours = {command.word for command in COMMANDS}
    for entry in entry_points(group=GROUP):
        if entry.name not in ours:
            yield entry.name, entry.value


def _help_text() -> str:
    lines = [
        "usage: fedge [--version] [--debug] COMMAND ...",
        "",
        "Fine-tunes foundation models on the devices where the private data lives, and never moves that data.",
        "",
        "commands:",
    ]
    for command in COMMANDS:
        lines.append(f"  {command.word:<10} {command.about}{_missing_text(command)}")
    lines += [f"  {name:<10} from {target.partition('.')[0]}" for name, target in _foreign()]
    return "\n".join([*lines, "", _FIRST_STEPS])


def _missing_text(command: Command) -> str:
    from importlib.util import find_spec

    room = command.target.partition(".")[0]
    if all(find_spec(module) for module in (room, *command.needs)):
        return ""
    return f"\n{'':<13}not installed here: {_pip_line(command)}"


def _pip_line(command: Command) -> str:
    return f"pip install 'fedge[{command.extra}]'" if command.extra else "pip install fedge"


def _explain(error: Exception, word: str) -> int:
    if isinstance(error, ModuleNotFoundError):
        error = _from_missing_module(error, word) or error
    elif isinstance(error, OSError):
        error = _from_os_error(error) or error
    if isinstance(error, FedgeError):
        return _fail(str(error), error.exit_code)
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return _fail(f"{text}. This is a bug in fedge: run it again with --debug to see where", BUG_CODE)


def _fail(text: str, code: int) -> int:
    print(f"fedge: {' '.join(text.split())}", file=sys.stderr)
    return code


def _from_missing_module(error: ModuleNotFoundError, word: str) -> FedgeError | None:
    for command in COMMANDS:
        if command.word == word:
            hint = f"This brings it: {_pip_line(command)}"
            return UnavailableError(f"`fedge {word}` needs {error.name}, which is not installed", hint=hint)
    return None


def _from_os_error(error: OSError) -> FedgeError | None:
    """The world's refusals in the operator's words; None for what can only be a bug of ours."""
    from pathlib import Path

    from fedge.io.durable import storage_error

    reason = error.strerror or str(error)
    if error.errno == errno.EADDRINUSE:
        return UnavailableError(f"the port is taken: {reason}", hint="Choose another one, or stop its owner")
    if error.errno == errno.EMFILE:
        return UnavailableError(
            "too many open files", hint="Raise the limit (`ulimit -n 4096`) and try again"
        )
    if error.errno == errno.ENOENT and error.filename:
        return NoInputError(f"{os.fsdecode(error.filename)} does not exist", hint="Check the path")
    if error.errno in _DISK and error.filename:
        return storage_error(error, Path(os.fsdecode(error.filename)), verb="use")
    if error.errno in _DISK:  # a stream, as standard output
        return StorageError(f"cannot write: {reason}", hint="Free some room, or send the output elsewhere")
    if isinstance(error, (ConnectionError, TimeoutError)) or error.errno in _NETWORK:
        return UnavailableError(
            f"no connection: {reason}", hint="Check the address and the network, then try again"
        )
    return None


def _take_debug(words: list[str]) -> bool:
    """`--debug` may stand anywhere before a bare `--`."""
    end = words.index("--") if "--" in words else len(words)
    found = "--debug" in words[:end]
    words[:end] = [word for word in words[:end] if word != "--debug"]
    return found
