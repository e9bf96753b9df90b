"""How a device is doing, for its owner: read from its home, without disturbing the agent that may run there."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec

from edge_agent.home import Home
from edge_agent.journal import Journal
from edge_agent.policy import Policy, load_policy
from edge_agent.stats import Figures
from fedge.errors import UnavailableError

_DAY_SECONDS = 86_400


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What `fedge agent status --json` prints."""

    home: str
    fleet: str
    device: str
    hub: str
    running: bool
    certificate_days_left: int
    rounds_opened: int
    policy: Policy
    figures: Figures | None


def look(home: Home) -> Status:
    """The status of the device in `home`. NoInputError when none lives there; whatever is damaged is an error."""
    identity = home.who()
    try:
        figures = msgspec.json.decode(home.stats.read_bytes(), type=Figures)
    except (OSError, msgspec.MsgspecError):
        figures = None  # it never ran, or is writing just now
    return Status(
        home=str(home.folder),
        fleet=identity.fleet,
        device=identity.device,
        hub=identity.url,
        running=_running(home),
        certificate_days_left=int((identity.valid()[1] - time.time()) // _DAY_SECONDS),
        rounds_opened=Journal(home.state).load().rounds_opened,
        policy=load_policy(home.policy),
        figures=figures,
    )


def _running(home: Home) -> bool:
    try:
        with home.alone():
            return False
    except UnavailableError:
        return True


def lines(status: Status) -> Iterator[str]:
    """The same for people."""
    yield f"device     {status.device} of fleet {status.fleet}, hub {status.hub}"
    yield f"home       {status.home}"
    yield f"agent      {'running' if status.running else 'not running'}"
    yield f"valid      {status.certificate_days_left} more days"
    figures = status.figures
    if figures is None:
        yield "rounds     none yet"
        return
    if figures.why_not and status.running:
        yield f"work       not now: {figures.why_not}"
    phase = figures.phase if status.running else f"{figures.phase}, when it last ran"
    yield f"campaign   {figures.campaign or 'none yet'} ({phase})"
    yield f"link       {'up' if figures.link_up and status.running else figures.problem or 'down'}"
    yield f"rounds     {status.rounds_opened} opened of {figures.rounds} ended"
    yield (
        f"bytes      {figures.mqtt_up_bytes:,} up, {figures.mqtt_down_bytes:,} down, "
        f"{figures.https_down_bytes:,} downloaded"
    )
    yield f"memory     {figures.rss_mb:g} MB, peak {figures.peak_rss_mb:g} MB with the worker"
