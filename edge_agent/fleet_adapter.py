"""`fedge agent adapter`: the fleet's newest adapter as a file, for the owner of a device that takes part.

Whoever trains may use what came of it. The campaign's announcement, which the agent has verified and saved, names the
adapter by its hash; it is renewed at most hourly while rounds go on, and when the campaign closes. The adapter is taken
from the device's own downloads or fetched from the hub, beside an agent that may be running, and written as the file
that `fedge agent generate`, `chat`, `embed` and `personalise` read.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edge_agent.believed import campaign_in
from edge_agent.home import Home
from edge_agent.journal import Journal
from edge_agent.trial import check_target, open_bundle_manifest
from fedge.errors import DataError, NoInputError, UnavailableError
from fedge.io.fetch import Fetcher
from fedge.io.tls import client_tls

if TYPE_CHECKING:
    from fedge.messages import Announcement


class FleetAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """What `fedge agent adapter --json` prints. `version` counts the fleet's rounds that are in it."""

    campaign: str
    version: int
    closed: bool
    model: str
    bundle: str  # the folder that it belongs to
    adapter: str  # the file that was written


def text(taken: FleetAdapter) -> str:
    """The same for people."""
    state = "the last" if taken.closed else "as the hub announced it, at most hourly"
    return (
        f"{taken.campaign}: version {taken.version} ({state}) of an adapter for {taken.model}: {taken.adapter}\n"
        f"its bundle: {taken.bundle}\n"
        f"try it: fedge agent chat {taken.bundle} --adapter {taken.adapter}"
    )


def take(home: Home, out: Path, blobs: Path | None = None) -> FleetAdapter:
    """Write the newest adapter that this device knows of to the file `out`. `blobs`: the agent's shared downloads.

    Raises NoInputError when the device never joined, follows no campaign or has no bundle yet; UnavailableError when
    the hub cannot be reached; IntegrityError when it gives something else; UsageError when `out` would replace
    something else.
    """
    home.who()
    check_target(out)
    state, folder = Journal(home.state).load(), blobs or home.blobs
    if not state.announcement:
        raise NoInputError(
            "this device follows no campaign yet",
            field="home",
            value=str(home.folder),
            hint="Let it take part: fedge agent run --data FILE",
        )
    campaign = campaign_in(state.announcement)
    bundle = folder / f"{campaign.manifest.sha256.hex()}.bundle"
    if not bundle.exists():
        raise NoInputError(
            "the bundle of the campaign is not on this device",
            field="blobs",
            value=str(folder),
            hint="The agent fetches it; where it was told `run --blobs DIR`, say so here, too",
        )
    manifest = open_bundle_manifest(bundle)
    content = _content(home, folder, campaign)

    import numpy as np

    from fedge.io.adapter_file import adapter_of_state, write_adapter
    from fedge.rules import rule_of

    training = campaign.training
    if len(content) % 4:
        raise DataError("adapter is no row of float32 numbers", field="bytes", value=len(content))
    vector = np.frombuffer(content, "<f4").astype(np.float32)
    rule = rule_of(training.rule, manifest.layout, training.a_seed, numbers=vector.size)
    write_adapter(out, adapter_of_state(manifest, rule, training.rule, vector, steps=0))  # the hub knows them
    return FleetAdapter(
        campaign=campaign.campaign,
        version=campaign.adapter_version,
        closed=campaign.closed,
        model=manifest.model,
        bundle=str(bundle),
        adapter=str(out),
    )


def _content(home: Home, blobs: Path, campaign: Announcement) -> bytes:
    """Of the adapter's blob. The agent's own folder is only read: it may be sweeping there."""
    ref = campaign.adapter
    try:
        content = (blobs / ref.sha256.hex()).read_bytes()
        if hashlib.sha256(content).digest() == ref.sha256:
            return content
    except FileNotFoundError:
        pass
    with tempfile.TemporaryDirectory(prefix="fedge-adapter-") as folder:  # 0700
        tls = client_tls(home.authority, home.certificate, home.key)
        fetcher = Fetcher(Path(folder), tls, threading.Event())
        try:
            return fetcher.fetch(campaign.url, ref.sha256, ref.size).read_bytes()
        except UnavailableError as error:
            raise UnavailableError(
                f"the newest adapter lies at the hub, which did not give it: {error.what}",
                field="url",
                value=campaign.url,
                hint="Try again when the hub can be reached",
            ) from error
