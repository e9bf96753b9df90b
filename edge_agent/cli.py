"""`fedge agent`: join a fleet, run, look, and try things out alone. Nothing heavy is imported before a word runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edge_agent.data_cli import add_chat, add_data, add_reading, reading_of, words_of
from edge_agent.embed_cli import add_embed
from edge_agent.generator_cli import add_generate
from fedge.lora import RULES

if TYPE_CHECKING:
    from edge_agent.home import Home
    from fedge.messages import Training

_EPILOG: Final = """\
a first device:
  fedge agent train-once DIR my.jsonl                    alone, without a network: does it learn on this board?
  fedge agent enroll TOKEN                               join a fleet; the operator has the token
  fedge agent run --data my.jsonl                        take part; stop it with Ctrl-C, nothing is lost
  fedge agent status                                     from another terminal
  fedge agent adapter --out fleet.fedge                  what came of it, for this device
  fedge agent unit --data my.jsonl                       the same as a systemd service

The data file never leaves this device. JSON Lines, a table, plain text; look at it first: fedge agent data FILE
  {"prompt": "how was it?", "completion": "so good"}
  {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
or, for a bundle that makes vectors of texts, pairs that belong together:
  {"anchor": "how was it?", "positive": "did you like it?"}
or, for a bundle that hears, a folder of WAV files with a folder for each class, or a list:
  {"audio": "clips/1.wav", "label": "yes"}

What a hub may ask of this device is bounded by policy.toml in its home; the defaults are explained there.
"""
_HOME_HELP: Final = "where this device keeps its identity and state (default: ~/.local/share/fedge/agent)"


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `agent` and its words."""
    agent = subparsers.add_parser(
        "agent",
        help="the device",
        description="The device: joins a fleet and trains on private data that stays here.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words = agent.add_subparsers(dest="agent_command", metavar="WORD", required=True)
    _add_enroll(words)
    _add_run(words)
    _add_status(words)
    _add_train_once(words)
    _add_adapter(words)
    _add_personalise(words)
    _add_unit(words)
    add_data(words)
    add_generate(words)
    add_embed(words)


def _add_enroll(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    enroll = words.add_parser(
        "enroll",
        help="join a fleet with a one-time token",
        description="Joins a fleet. Keys are made here and never leave; the token, one line from `fedge hub token`, "
        "says where the hub is and how to recognise it, and is used up.",
    )
    enroll.add_argument("token", metavar="TOKEN", help="the line that begins with fedge1.")
    enroll.add_argument(
        "--name", default="", help="a name to ask for, a-z, 0-9 and - (default: the hub chooses)"
    )
    _add_home(enroll)
    enroll.set_defaults(run=_enroll)


def _add_run(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = words.add_parser(
        "run",
        help="take part in the fleet's rounds until stopped",
        description="Takes part until SIGTERM or Ctrl-C. It may be killed at any moment: it goes on where it was.",
    )
    run.add_argument(
        "--data", type=Path, required=True, metavar="FILE", help="private examples: JSON Lines, a table, text"
    )
    run.add_argument("--threads", type=_count, default=0, help="for training (default: all it may use)")
    run.add_argument(
        "--linger",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="keep an idle worker so long (default: 20)",
    )
    shared = run.add_argument_group("several agents on one machine")
    shared.add_argument("--blobs", type=Path, metavar="DIR", help="share downloads in this folder")
    shared.add_argument(
        "--slots", type=Path, metavar="DIR", help="take turns: locks of training slots lie here"
    )
    shared.add_argument(
        "--slot-count", type=_count, default=1, metavar="N", help="so many train at a time (1)"
    )
    add_reading(run)
    _add_home(run)
    run.set_defaults(run=_run)


def _add_status(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    status = words.add_parser("status", help="who this device is and how it is doing")
    status.add_argument("--json", action="store_true", help="as one JSON object")
    _add_home(status)
    status.set_defaults(run=_status)


def _add_train_once(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    once = words.add_parser(
        "train-once",
        help="alone and offline: train a few steps, print the loss before and after, keep the adapter if told",
        description="Holds every fifth conversation out, trains some steps on the rest, and prints the loss on what "
        "was held out, before and after. Needs no fleet; nothing is kept but the adapter, when --adapter-out names a "
        "file. `fedge adapter` shows it, compares it, and turns it into a PEFT folder, a GGUF or a merged model.",
    )
    once.add_argument("bundle_folder", nargs="?", type=Path, metavar="BUNDLE", help="from `fedge quantize`")
    once.add_argument(
        "data_file",
        nargs="?",
        type=Path,
        metavar="DATA",
        help="private examples: JSON Lines, a table, text, recordings",
    )
    once.add_argument("--bundle", type=Path, metavar="DIR", help="the same as BUNDLE")
    once.add_argument("--data", type=Path, metavar="FILE", help="the same as DATA")
    once.add_argument("--steps", type=_count, default=5, help="training steps (default: 5)")
    once.add_argument("--adapter-out", type=Path, metavar="FILE", help="keep the adapter in this file")
    once.add_argument(
        "--from",
        dest="start",
        type=Path,
        metavar="ADAPTER",
        help="go on from this one: an adapter file, or a PEFT folder",
    )
    once.add_argument(
        "--rule",
        choices=RULES,
        help="what trains, as in a campaign: ffa (B alone), fedit (A and B), alternating (B and A by turns, at most "
        "5 steps each), core (a small matrix between two bases; a fourth of the steps, at most 5, look for them), "
        "sketch (A and B, sent as sketches) (default: that of the adapter gone on from, else ffa)",
    )
    once.add_argument(
        "--head-only",
        action="store_true",
        help="a classifier's head alone: each row is encoded once, so that many steps cost little",
    )
    once.add_argument("--rate", type=float, help="learning rate (default: what suits rule and task)")
    _add_step(once)
    once.set_defaults(run=_train_once)


def _add_step(words: argparse.ArgumentParser) -> None:
    """What every training by oneself may be told about its steps."""
    words.add_argument("--rows", type=_count, help="rows in a step, or pairs of texts (default: the fleet's)")
    words.add_argument("--window", type=_count, metavar="TOKENS", help="longest row (default: the fleet's)")
    words.add_argument("--seed", type=_count, default=0, metavar="N", help="order of the rows (default: 0)")
    words.add_argument("--threads", type=_count, default=0, help="(default: all it may use)")
    words.add_argument("--json", action="store_true", help="as one JSON object")
    add_chat(words)
    add_reading(words)


def _add_adapter(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    adapter = words.add_parser(
        "adapter",
        help="the fleet's newest adapter as a file, to use it on this device",
        description="Whoever trains may use what came of it. Writes the newest adapter of the campaign that this "
        "device follows to a file that `fedge agent chat`, `generate`, `embed` and `personalise` take, and says where "
        "its bundle is. The agent may be running.",
    )
    adapter.add_argument("--out", type=Path, required=True, metavar="FILE", help="write it here")
    adapter.add_argument("--blobs", type=Path, metavar="DIR", help="the folder that `run --blobs` was given")
    adapter.add_argument("--json", action="store_true", help="as one JSON object")
    _add_home(adapter)
    adapter.set_defaults(run=_adapter)


def _add_personalise(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    own = words.add_parser(
        "personalise",
        help="your own adapter from the fleet's and your data, kept only when held-out examples agree",
        description="Trains both factors of the fleet's adapter for a few steps on your data, and another adapter on "
        "your data alone; measures these, and the mean of the two, on every fifth conversation. Only when one of them "
        "is better than the fleet's is it written to --adapter-out, for this device alone: it never leaves it.",
    )
    own.add_argument("bundle", type=Path, metavar="BUNDLE", help="from `fedge quantize`")
    own.add_argument("data", type=Path, metavar="DATA", help="private examples: JSON Lines, a table, text")
    own.add_argument(
        "--from",
        dest="start",
        type=Path,
        required=True,
        metavar="ADAPTER",
        help="the fleet's adapter: a file of `fedge agent adapter`, or a PEFT folder",
    )
    own.add_argument("--adapter-out", type=Path, required=True, metavar="FILE", help="your own adapter")
    own.add_argument(
        "--steps",
        type=_count,
        action="append",
        metavar="N",
        help="measure after N steps on top of the fleet's (5, 10 and 20); may be repeated",
    )
    own.add_argument(
        "--alone-steps",
        type=_count,
        action="append",
        metavar="N",
        help="measure after N steps from the base model (20 and 40); may be repeated; 0: try nothing alone",
    )
    _add_step(own)
    own.set_defaults(run=_personalise)


def _add_unit(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    unit = words.add_parser(
        "unit",
        help="print a systemd unit for this agent",
        description="Prints a hardened unit with this machine's paths. To install it: "
        "fedge agent unit --data FILE | sudo tee /etc/systemd/system/fedge-agent.service",
    )
    unit.add_argument(
        "--data", type=Path, required=True, metavar="FILE", help="private examples: JSON Lines, a table, text"
    )
    add_reading(unit)
    _add_home(unit)
    unit.set_defaults(run=_unit)


def _add_home(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--home", type=Path, metavar="DIR", help=_HOME_HELP)


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return number


def _home(arguments: argparse.Namespace) -> Home:
    from edge_agent.home import Home, default_home

    return Home(arguments.home.absolute()) if arguments.home else default_home()


# ---------------------------------------------------------------- what the words do
def _enroll(arguments: argparse.Namespace) -> None:
    from edge_agent.enrol import enroll

    home = _home(arguments)
    identity = enroll(arguments.token, home, name=arguments.name)
    print(f"joined fleet {identity.fleet} as {identity.device}; home: {home.folder}")
    print(f"your bounds for what a hub may ask: {home.policy}")
    print("next: fedge agent run --data FILE")


def _run(arguments: argparse.Namespace) -> int:
    from edge_agent import driver
    from edge_agent.settings import Settings

    return driver.run(
        Settings(
            home=_home(arguments),
            data=arguments.data,
            reading=reading_of(arguments),
            blobs=arguments.blobs,
            slots=arguments.slots,
            slot_count=arguments.slot_count,
            threads=arguments.threads,
            linger_seconds=arguments.linger,
        )
    )


def _status(arguments: argparse.Namespace) -> None:
    import msgspec

    from edge_agent.status import lines, look

    status = look(_home(arguments))
    if arguments.json:
        print(msgspec.json.encode(status).decode())
    else:
        print("\n".join(lines(status)))


def _adapter(arguments: argparse.Namespace) -> None:
    import msgspec

    from edge_agent.fleet_adapter import take, text

    taken = take(_home(arguments), arguments.out, arguments.blobs)
    print(msgspec.json.encode(taken).decode() if arguments.json else text(taken))


def _train_once(arguments: argparse.Namespace) -> None:
    import msgspec

    from edge_agent import trial
    from edge_agent.alone import rule_and_rate

    bundle = _either(arguments.bundle_folder, arguments.bundle, "BUNDLE")
    data = _either(arguments.data_file, arguments.data, "DATA")
    task = trial.open_bundle_manifest(bundle).task
    rule, rate = rule_and_rate(arguments.rule, arguments.rate, arguments.start, task)
    found = trial.train_once(
        bundle,
        data,
        steps=arguments.steps,
        training=_training(arguments, task, rule, rate),
        threads=arguments.threads,
        progress=trial.on_terminal,
        adapter_out=arguments.adapter_out,
        start=arguments.start,
        reading=reading_of(arguments),
        head_only=arguments.head_only,
    )
    print(msgspec.json.encode(found).decode() if arguments.json else trial.text(found))


def _training(arguments: argparse.Namespace, task: str, rule: str, rate: float) -> Training:
    """From the flags of `_add_step`. Raises UsageError."""
    import msgspec

    from fedge.errors import UsageError
    from fedge.messages import Training
    from fedge.rules import usual_rows

    wanted = {
        "rate": rate,
        "rule": rule,
        "batch_rows": usual_rows(task) if arguments.rows is None else arguments.rows,
        "window_tokens": arguments.window,
        "data_seed": arguments.seed,
        "template": {"kind": "chat"} if arguments.chat else None,
    }
    try:
        return msgspec.convert({name: value for name, value in wanted.items() if value is not None}, Training)
    except msgspec.ValidationError as error:
        raise UsageError(f"training cannot be done so: {error}") from error


def _personalise(arguments: argparse.Namespace) -> None:
    import msgspec

    from edge_agent import personal_once, trial
    from edge_agent.personal import own_rate

    task = trial.open_bundle_manifest(arguments.bundle).task
    found = personal_once.personalise_once(
        arguments.bundle,
        arguments.data,
        arguments.start,
        arguments.adapter_out,
        steps=tuple(sorted(set(arguments.steps or ()))),
        alone_steps=arguments.alone_steps and tuple(sorted(set(arguments.alone_steps) - {0})),
        training=_training(arguments, task, "fedit", own_rate(task)),
        threads=arguments.threads,
        progress=trial.on_terminal,
        reading=reading_of(arguments),
    )
    print(msgspec.json.encode(found).decode() if arguments.json else personal_once.text(found))


def _either(placed: Path | None, flagged: Path | None, name: str) -> Path:
    """A value that may stand by itself or behind a flag; once."""
    from fedge.errors import UsageError

    if (placed is None) == (flagged is None):
        what = "is missing" if placed is None else "is given twice"
        raise UsageError(f"{name} {what}", hint="fedge agent train-once BUNDLE DATA --steps N")
    return placed or flagged or Path()


def _unit(arguments: argparse.Namespace) -> None:
    from edge_agent.unit import unit_text

    print(unit_text(_home(arguments), arguments.data, words_of(reading_of(arguments))), end="")
