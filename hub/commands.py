"""What the words of `fedge hub` do. Results go to standard output, remarks to standard error."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from fedge.authority import fingerprint
from fedge.errors import NoInputError, UsageError
from fedge.io.durable import make_folder, write_bytes
from fedge.joining import JoinToken
from hub.authority import authority_folder, create_authority, load_authority
from hub.blobs import Blobs
from hub.campaigns import Wish, make_campaign, read_bundle
from hub.config import default_home, load_config
from hub.effects import CampaignRow, LedgerEntry
from hub.registry import Registry
from hub.store import FILE, Store

if TYPE_CHECKING:
    from hub.standing import Standing

_TOKENS_MAX: Final = 10_000
_MINUTES_MAX: Final = 30 * 24 * 60
_FOLLOW_SECONDS: Final = 0.5


class CampaignSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A campaign for people and scripts."""

    id: str
    closed: bool
    rounds: int
    adapter_version: int
    adapter: str
    numbers: int
    steps: int
    bloc: int
    devices: int
    rate: float
    rule: str
    mean_norm: float


def home_of(given: Path | None) -> Path:
    """The hub's folder: the one given, or the default."""
    return given if given is not None else default_home()


def create(home: Path, fleet: str) -> None:
    """Creates a hub in `home`: authority first, database last."""
    create_authority(home, fleet, now=time.time(), entropy=os.urandom)
    Store.open(home / FILE).close()


def init(home: Path, fleet: str) -> None:
    """`create`, and a word about it."""
    create(home, fleet)
    print(f"hub of {fleet} created in {home}")
    print(f"next: fedge hub up{_home_flag(home)}", file=sys.stderr)


def up(
    home: Path, flags: Mapping[str, object], *, ready_file: Path | None = None, announce_fd: int | None = None
) -> None:
    """Runs the hub until a signal."""
    from hub.server import ReadyInfo, run_hub

    config = load_config(home, flags)

    def on_ready(info: ReadyInfo) -> None:
        line = msgspec.json.encode(info) + b"\n"
        if ready_file is not None:
            write_bytes(ready_file, line)
        if announce_fd is not None:
            os.write(announce_fd, line)
        broker = f"{info.broker} broker on port {info.mqtt_port}"
        print(f"hub: {info.fleet} is up at {info.url}, {broker}", file=sys.stderr, flush=True)

    run_hub(config, on_ready)


def token(home: Path, count: int, minutes: float) -> None:
    """Prints join tokens."""
    if not 1 <= count <= _TOKENS_MAX:
        raise UsageError("too many or too few tokens", field="count", value=count, hint=f"1 to {_TOKENS_MAX}")
    if not 0 < minutes <= _MINUTES_MAX:
        hint = "more than 0, at most 30 days"
        raise UsageError("a token cannot live so long", field="minutes", value=minutes, hint=hint)
    for text in new_tokens(home, count, minutes):
        print(text)
    print(f"good for {minutes:g} minutes, each for one device: fedge agent enroll TOKEN", file=sys.stderr)


def new_tokens(home: Path, count: int, minutes: float) -> list[str]:
    """Join tokens of the hub in `home`, each for one device."""
    with _store(home) as store:
        url = _url(store)
        pin = fingerprint((authority_folder(home) / "authority.pem").read_bytes())
        registry, until = Registry(store, os.urandom), 60 * minutes
        secrets = [registry.new_token(now=time.time(), seconds=until) for _ in range(count)]
    return [JoinToken(url, pin, secret).text() for secret in secrets]


def new_campaign(home: Path, bundle: Path, wish: Wish) -> CampaignRow:
    """Checks a campaign, keeps its bundle and leaves it for the hub."""
    if not wish.name:
        wish = dataclasses.replace(wish, name=_campaign_name(bundle))
    with _store(home) as store:
        known = {row.id for row in store.campaigns()} | {row.id for _, row in store.asked()}
        if wish.name in known:
            raise UsageError("a campaign's name is used once", field="name", value=wish.name)
        blobs = Blobs(home / "blobs")
        row = make_campaign(wish, bundle, blobs, _url(store), tell=lambda text: print(text, file=sys.stderr))
        store.ask(row)
    return row


def campaign_start(home: Path, bundle: Path, wish: Wish) -> None:
    """`new_campaign`, and when it begins."""
    from hub.server import is_running

    row = new_campaign(home, bundle, wish)
    print(row.id)
    begins = "it begins" if is_running(home) else f"it begins with `fedge hub up{_home_flag(home)}`"
    print(
        f"{begins} when {row.form_at_devices} devices are ready; watch: fedge hub ledger --follow",
        file=sys.stderr,
    )


def campaign_list(home: Path, *, as_json: bool) -> None:
    """Lists the campaigns."""
    with _store(home, read_only=True) as store:
        campaigns = [_summary(row) for row in store.campaigns()]
        waiting = [row.id for _, row in store.asked()]
    for one in campaigns:
        state = "closed" if one.closed else "running"
        print(_json(one) if as_json else f"{one.id:<32} {state:<8} adapter version {one.adapter_version}")
    if not as_json:
        for name in waiting:
            print(f"{name:<32} waiting for the hub")
    if not campaigns and not waiting:
        print("no campaign yet: fedge hub campaign start --bundle DIR", file=sys.stderr)


def campaign_show(home: Path, campaign: str, *, as_json: bool) -> None:
    """Shows one campaign."""
    with _store(home, read_only=True) as store:
        summary = _summary(_campaign(store, campaign))
    if as_json:
        print(_json(summary))
        return
    for field in CampaignSummary.__struct_fields__:
        print(f"{field:<16} {getattr(summary, field)}")


def revoke(home: Path, device: str) -> None:
    """Ends a device's membership."""
    with _store(home) as store:
        Registry(store, os.urandom).revoke(device, now=time.time())
    print(f"{device} is revoked")


def export(home: Path, campaign: str, out: Path, *, kind: str = "peft") -> None:
    """Writes the adapter as a PEFT folder, or as an adapter file (`kind` "file")."""
    from hub.export import export_adapter, export_file

    with _store(home, read_only=True) as store:
        row = _campaign(store, campaign)
    if kind == "file":
        export_file(row, Blobs(home / "blobs"), out)
    else:
        make_folder(out)
        export_adapter(row, Blobs(home / "blobs"), out)
    print(f"adapter version {row.adapter_version} of {campaign} written to {out}")


def devices(home: Path, campaign: str, *, most: int, as_json: bool) -> None:
    """Says of each device why it is not working."""
    from hub.views import show_devices

    found = _standing(home, most)
    if as_json:
        print(_json(found))
    else:
        show_devices(found, campaign=campaign, most=most)


def blocs(home: Path, campaign: str, *, most: int, as_json: bool) -> None:
    """Shows each bloc, and who holds it up."""
    from hub.views import show_blocs

    found = _standing(home, most)
    if as_json:
        print(_json(found))
    else:
        show_blocs(found, campaign=campaign, most=most)


def _standing(home: Path, most: int) -> Standing:
    from hub.server import is_running
    from hub.views import read_standing

    if most < 1:
        raise UsageError("a table has rows", field="top", value=most, hint="At least 1")
    load_authority(home)
    return read_standing(home, running=is_running(home))


def ledger(home: Path, *, follow: bool, as_json: bool) -> None:
    """Prints the ledger."""
    with _store(home, read_only=True) as store:
        newest = 0
        while True:
            entries = store.entries(newest)
            for number, entry in entries:
                print(_entry_json(number, entry) if as_json else _entry_text(entry), flush=follow)
                newest = number
            if not entries and not follow:
                return
            if not entries:
                time.sleep(_FOLLOW_SECONDS)


def status(home: Path, *, as_json: bool) -> None:
    """Says how the hub is."""
    from hub.server import READY, is_running

    running = is_running(home)
    ready = home / READY
    info: dict[str, object] = {}
    if running and ready.exists():
        info = msgspec.json.decode(ready.read_bytes(), type=dict[str, object])
    with _store(home, read_only=True) as store:
        devices = Registry(store, os.urandom).devices()
        campaigns = [_summary(row) for row in store.campaigns()]
    told = {
        "running": running,
        "ready": bool(info),
        **info,
        "devices": [{"id": name, "joined_at": at, "revoked": revoked} for name, at, revoked in devices],
        "campaigns": campaigns,
    }
    if as_json:
        print(_json(told))
        return
    state = "up" if info else "starting" if running else f"not running (fedge hub up{_home_flag(home)})"
    print(f"hub        {state}")
    for field in ("fleet", "url", "broker", "mqtt_port", "pid", "epoch"):
        if field in info:
            print(f"{field:<10} {info[field]}")
    print(f"devices    {len(devices)} joined, {sum(revoked for _, _, revoked in devices)} revoked")
    for name, _, revoked in devices:
        print(f"           {name}{' (revoked)' if revoked else ''}")
    print(f"campaigns  {sum(not one.closed for one in campaigns)} running, {len(campaigns)} in all")


# ---------------------------------------------------------------- shared
@contextmanager
def _store(home: Path, *, read_only: bool = False) -> Iterator[Store]:
    load_authority(home)  # says it in one line when there is no hub here
    store = Store.open(home / FILE, read_only=read_only)
    try:
        yield store
    finally:
        store.close()


def _url(store: Store) -> str:
    url = store.fact("url")
    if url is None:
        raise UsageError("the hub has no address yet", hint="Start it once: fedge hub up")
    return url


def _campaign(store: Store, campaign: str) -> CampaignRow:
    for row in store.campaigns():
        if row.id == campaign:
            return row
    raise NoInputError(f"no campaign {campaign}", hint="`fedge hub campaign list` lists them")


def _campaign_name(bundle: Path) -> str:
    manifest, _, _ = read_bundle(bundle)
    stem = re.sub(r"[^a-z0-9]+", "-", manifest.model.rsplit("/", 1)[-1].lower()).strip("-")[:40] or "campaign"
    return f"{stem}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"


def _summary(row: CampaignRow) -> CampaignSummary:
    return CampaignSummary(
        id=row.id,
        closed=row.closed,
        rounds=row.rounds,
        adapter_version=row.adapter_version,
        adapter=row.adapter.sha256.hex(),
        numbers=row.numbers,
        steps=row.steps,
        bloc=row.bloc_devices,
        devices=row.form_at_devices,
        rate=row.training.rate,
        rule=row.training.rule,
        mean_norm=row.mean_norm,
    )


def _entry_json(number: int, entry: LedgerEntry) -> str:
    return _json({"id": number, **msgspec.structs.asdict(entry)})


def _entry_text(entry: LedgerEntry) -> str:
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.at))
    where = " ".join(word for word in (entry.campaign, entry.bloc, entry.device) if word)
    number = f" round {entry.round}" if entry.round else ""
    detail = " ".join(f"{name}={_short(value)}" for name, value in entry.detail.items())
    return f"{at}  {entry.kind:<9} {where}{number} {detail}".rstrip()


def _short(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _home_flag(home: Path) -> str:
    return "" if home == default_home() else f" --home {home}"
