"""`fedge hub`: create a hub, run it, let devices in, start campaigns, read what happened.

Everything but `up` works beside a running hub: the database is shared, and the hub looks into it twice a second.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from fedge.lora import RULES

_EPILOG: Final = """\
a first hub:
  fedge hub init                                create it: keys, authority, database
  fedge hub up                                  run it; stop it with Ctrl-C
  fedge hub token --count 8                     eight lines, each lets one device join: fedge agent enroll LINE
  fedge hub campaign start --bundle DIR         train; the devices begin when enough of them are ready
  fedge hub ledger --follow                     watch
  fedge hub blocs                               who holds up which bloc; fedge hub devices: why each is not working
  fedge hub export CAMPAIGN --out adapter/      the adapter, as PEFT loads it
"""

_DEVICES_EPILOG: Final = """\
why a device is not working (its own reasons first, then its bloc's):
  not now, hot, low battery, metered   its owner's policy or its board says: not at present
  no data, rounds spent, short stay    it has nothing to train on, no rounds left, or expects to leave too soon
  absent                               switched off, or no link
  not ready                            fetching the bundle, or it has not heard how its round ended
  unassigned                           waits for enough newcomers to fill a bloc
  waiting for DEVICE                   all others of its bloc are ready
  resting, quota, cap                  the bloc rests, had more than its share, or enough devices train
  starving                             too few blocs are live; nothing is opened until a quarter is
The worst breakers come first: those for whom alone their blocs waited longest.
"""
_BLOCS_EPILOG: Final = """\
A bloc opens when all its members are ready: its sum exists whole or not at all. "here" counts members that are ready,
or reports that are in; "breaker" is the one member that the bloc waits for, or waited for longest. Tell its owner, or
leave it out of the next campaign. "live" blocs are whole, at work, or were opened within two hours.
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `hub` and its words. Imports nothing heavy."""
    hub = subparsers.add_parser(
        "hub",
        help="the server",
        description="The server: broker, rounds, aggregation, adapters.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words = hub.add_subparsers(dest="hub_command", metavar="WORD", required=True)
    _add_init(words)
    _add_up(words)
    _add_token(words)
    _add_campaign(words)
    _add_revoke(words)
    _add_reading(words)


_Words = argparse._SubParsersAction


def _word(
    words: _Words[argparse.ArgumentParser], name: str, about: str, epilog: str = ""
) -> argparse.ArgumentParser:
    parser = words.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--home", type=Path, metavar="DIR", help="the hub's folder (~/.local/share/fedge/hub)"
    )
    return parser


def _add_init(words: _Words[argparse.ArgumentParser]) -> None:
    parser = _word(
        words,
        "init",
        "create a hub: its keys, its authority, its database",
        "The folder authority/ is the root of all trust: who copies it can invent devices. Back it up, keep it\n"
        "secret. Next: fedge hub up",
    )
    parser.add_argument(
        "--fleet", default="fleet", metavar="NAME", help="the fleet's name, in every certificate"
    )
    parser.set_defaults(run=_init)


def _add_up(words: _Words[argparse.ArgumentParser]) -> None:
    parser = _word(
        words,
        "up",
        "run the hub until Ctrl-C",
        "The same settings may stand in DIR/config.toml: bind, https_port, mqtt_port, broker, public_names.\n"
        "Next, in another terminal: fedge hub token",
    )
    parser.add_argument("--bind", metavar="ADDRESS", help="address to listen on (0.0.0.0: everywhere)")
    parser.add_argument(
        "--port",
        type=int,
        dest="https_port",
        metavar="N",
        help="HTTPS port (8443; 0: choose one and keep it)",
    )
    parser.add_argument(
        "--mqtt-port", type=int, metavar="N", help="MQTT port (8883; 0: choose one and keep it)"
    )
    parser.add_argument(
        "--broker", metavar="WHICH", help="auto (default), mosquitto, embedded, or mqtts://HOST:PORT"
    )
    parser.add_argument(
        "--name",
        action="append",
        dest="public_names",
        metavar="HOST",
        help="a name or address under which devices reach this machine; the first is told to them",
    )
    parser.add_argument(
        "--ready-file", type=Path, metavar="FILE", help="write one JSON line there when it is up"
    )
    parser.add_argument("--announce-fd", type=int, metavar="N", help="write the same line to this descriptor")
    parser.set_defaults(run=_up)


def _add_token(words: _Words[argparse.ArgumentParser]) -> None:
    parser = _word(
        words,
        "token",
        "print join tokens; each lets one device join",
        "On the device: fedge agent enroll TOKEN\nA token is a secret until it is used. Only its hash is kept here.",
    )
    parser.add_argument("--count", type=int, default=1, metavar="N", help="how many, one a line (1)")
    parser.add_argument(
        "--minutes", type=float, default=60.0, metavar="M", help="how long they are good (60)"
    )
    parser.set_defaults(run=_token)


def _add_rule(start: argparse.ArgumentParser) -> None:
    """What of the adapter moves, from where, and how far."""
    start.add_argument(
        "--batch-rows", type=int, default=None, metavar="N", help="examples in a step (4; pairs of texts: 16)"
    )
    start.add_argument(
        "--rate",
        type=float,
        default=None,
        metavar="N",
        help="learning rate (0.016 under ffa and core, else 0.008; for vectors of texts an eighth of it)",
    )
    start.add_argument(
        "--rule",
        default="ffa",
        choices=RULES,
        help="what of the adapter moves and travels: B alone (ffa), A and B (fedit), A and B in turn (alternating), "
        "a small core between frozen factors (core), sketches of the product (sketch) (%(default)s)",
    )
    start.add_argument(
        "--start-from", type=Path, default=None, metavar="DIR", help="a PEFT adapter to go on from"
    )
    start.add_argument(
        "--normalise-steps",
        action="store_true",
        help="let sums of few steps count more, of many less, by at most a factor of 2",
    )


def _add_campaign(words: _Words[argparse.ArgumentParser]) -> None:
    campaign = words.add_parser("campaign", help="start, list or show campaigns")
    inner = campaign.add_subparsers(dest="campaign_command", metavar="WORD", required=True)
    start = _word(
        inner,
        "start",
        "train an adapter on the fleet",
        "Works while the hub runs, and before: then it begins with `fedge hub up`.\n"
        "Next: fedge hub ledger --follow",
    )
    start.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="what `fedge quantize` made")
    start.add_argument(
        "--name", default="", metavar="NAME", help="of the campaign (made from the model and time)"
    )
    for flag, kind, default, about in (
        ("--rounds", int, 8, "how often each bloc is opened"),
        ("--steps", int, 5, "local steps of a device in a round"),
        ("--bloc", int, 8, "devices in a bloc, whose sum alone is ever seen; at least 5"),
        ("--devices", int, 16, "how many must be ready before blocs are formed"),
        ("--window-tokens", int, 64, "tokens of an example"),
        ("--window-seconds", int, 3_600, "how long a bloc may take for a round"),
        ("--seed", int, 0, "of the frozen half of the adapter and the order of data"),
        ("--work-seconds", float, 120.0, "how long a device's part in a round should take"),
        ("--training-max", int, 0, "blocs open while fewer devices train; 0: no bound"),
        ("--rest-seconds", float, 0.0, "how long a bloc rests between two rounds"),
        ("--quota", float, 0.0, "a bloc is opened at most N times the mean, and 2; 0: no bound"),
        ("--form-seconds", float, 1_800.0, "how long newcomers wait at least for blocs of newcomers"),
        (
            "--hours-max",
            float,
            0.0,
            "close after so many hours, whatever is missing; 0: when all rounds are done",
        ),
        ("--server-rate", float, 1.0, "above 1 the blocs that train side by side move the adapter further"),
    ):
        start.add_argument(flag, type=kind, default=default, metavar="N", help=f"{about} ({default:g})")
    _add_rule(start)
    start.set_defaults(run=_campaign_start)
    listing = _word(inner, "list", "list the campaigns")
    listing.add_argument("--json", action="store_true", help="one JSON object a line")
    listing.set_defaults(run=_campaign_list)
    show = _word(inner, "show", "show one campaign")
    show.add_argument("campaign", metavar="CAMPAIGN")
    show.add_argument("--json", action="store_true", help="as JSON")
    show.set_defaults(run=_campaign_show)


def _add_revoke(words: _Words[argparse.ArgumentParser]) -> None:
    parser = _word(
        words,
        "revoke",
        "end a device's membership for good",
        "A running hub refuses it within a second and ends its connection. Its bloc cannot be completed any more.",
    )
    parser.add_argument("device", metavar="DEVICE")
    parser.set_defaults(run=_revoke)


def _add_reading(words: _Words[argparse.ArgumentParser]) -> None:
    export = _word(
        words, "export", "write a campaign's newest adapter as a PEFT folder, or as an adapter file"
    )
    export.add_argument("campaign", metavar="CAMPAIGN")
    export.add_argument("--out", type=Path, required=True, metavar="PATH")
    export.add_argument(
        "--as",
        dest="kind",
        choices=("peft", "file"),
        default="peft",
        help="file: what `fedge adapter` shows, compares, merges and turns into a GGUF (default: peft)",
    )
    export.set_defaults(run=_export)
    for name, about, run, epilog in (
        ("devices", "say of each device why it is not working", _devices, _DEVICES_EPILOG),
        ("blocs", "show each bloc, and who holds it up", _blocs, _BLOCS_EPILOG),
    ):
        table = _word(words, name, about, epilog)
        table.add_argument("--campaign", default="", metavar="CAMPAIGN", help="only of this one")
        table.add_argument("--top", type=int, default=50, metavar="N", help="rows to show (50)")
        table.add_argument("--json", action="store_true", help="everything, as one JSON object")
        table.set_defaults(run=run)
    ledger = _word(words, "ledger", "print what happened, oldest first")
    ledger.add_argument("--follow", action="store_true", help="go on as it happens, until Ctrl-C")
    ledger.add_argument("--json", action="store_true", help="one JSON object a line, for programs")
    ledger.set_defaults(run=_ledger)
    status = _word(words, "status", "say whether the hub runs, and who and what is in it")
    status.add_argument("--json", action="store_true", help="as JSON")
    status.set_defaults(run=_status)


# ---------------------------------------------------------------- what the words do; imports wait until here
def _init(arguments: argparse.Namespace) -> None:
    from hub import commands

    commands.init(commands.home_of(arguments.home), arguments.fleet)


def _up(arguments: argparse.Namespace) -> None:
    from hub import commands

    names = arguments.public_names
    flags = {
        "bind": arguments.bind,
        "https_port": arguments.https_port,
        "mqtt_port": arguments.mqtt_port,
        "broker": arguments.broker,
        "public_names": tuple(names) if names else None,
    }
    home = commands.home_of(arguments.home)
    commands.up(home, flags, ready_file=arguments.ready_file, announce_fd=arguments.announce_fd)


def _token(arguments: argparse.Namespace) -> None:
    from hub import commands

    commands.token(commands.home_of(arguments.home), arguments.count, arguments.minutes)


def _campaign_start(arguments: argparse.Namespace) -> None:
    from hub import commands
    from hub.campaigns import Wish

    wish = Wish(
        name=arguments.name,
        rounds=arguments.rounds,
        steps=arguments.steps,
        bloc=arguments.bloc,
        devices=arguments.devices,
        rate=arguments.rate,
        batch_rows=arguments.batch_rows,
        window_tokens=arguments.window_tokens,
        window_seconds=arguments.window_seconds,
        seed=arguments.seed,
        work_seconds=arguments.work_seconds,
        training_max=arguments.training_max,
        rest_seconds=arguments.rest_seconds,
        quota=arguments.quota,
        form_seconds=arguments.form_seconds,
        hours_max=arguments.hours_max,
        server_rate=arguments.server_rate,
        rule=arguments.rule,
        start_from=arguments.start_from,
        normalise_steps=arguments.normalise_steps,
    )
    commands.campaign_start(commands.home_of(arguments.home), arguments.bundle, wish)


def _campaign_list(arguments: argparse.Namespace) -> None:
    from hub import commands

    commands.campaign_list(commands.home_of(arguments.home), as_json=arguments.json)


def _campaign_show(arguments: argparse.Namespace) -> None:
    from hub import commands

    commands.campaign_show(commands.home_of(arguments.home), arguments.campaign, as_json=arguments.json)


def _revoke(arguments: argparse.Namespace) -> None:
    from hub import commands

    commands.revoke(commands.home_of(arguments.home), arguments.device)


def _export(arguments: argparse.Namespace) -> None:
    from hub import commands

    commands.export(commands.home_of(arguments.home), arguments.campaign, arguments.out, kind=arguments.kind)


def _devices(arguments: argparse.Namespace) -> None:
    from hub import commands

    home = commands.home_of(arguments.home)
    commands.devices(home, arguments.campaign, most=arguments.top, as_json=arguments.json)


def _blocs(arguments: argparse.Namespace) -> None:
    from hub import commands

    home = commands.home_of(arguments.home)
    commands.blocs(home, arguments.campaign, most=arguments.top, as_json=arguments.json)


def _ledger(arguments: argparse.Namespace) -> None:
    from hub import commands

    commands.ledger(commands.home_of(arguments.home), follow=arguments.follow, as_json=arguments.json)


def _status(arguments: argparse.Namespace) -> None:
    from hub import commands

    commands.status(commands.home_of(arguments.home), as_json=arguments.json)
