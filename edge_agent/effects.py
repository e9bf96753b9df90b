"""What can happen to an agent (events) and what it can ask for (effects). Values only.

The real driver carries effects out with MQTT, files, a child process and the wall clock; the simulated one with a heap
of virtual time. Effects are carried out in order, and a `Save` is durable before the next one is touched.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from fedge.messages import Announcement, BlobRef, Facts, Hash, Training
from fedge.update.spec import UpdateCodec


class AgentState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an agent must still know after the power was cut. One file, replaced as a whole."""

    boot: int = 0
    counter: int = 0  # of READYs; never goes back
    sequence: int = -1  # newest announcement believed
    announcement: bytes = b""  # its envelope
    bundle: bytes = b""  # SHA-256 of the manifest whose files are here, whole and verified
    card: bytes = b""  # the pinned bloc card's envelope
    ready: bytes = b""  # the READY envelope that is out; its prekey:
    prekey: bytes = b""
    opened: bytes = b""  # the OPEN envelope of the running round
    last_round: int = 0  # highest round number ever accepted with the pinned card
    consumed: bytes = b""  # transcript whose masks may exist; written before any mask is made
    report: bytes = b""  # digest of the finished report on disk
    report_size: int = 0
    accepted: bool = False
    rounds_opened: int = 0
    seconds_per_step: float = 0.0

    def __repr__(self) -> str:
        """Without the prekey: whoever reads it in a log could take this device's masks off."""
        return f"AgentState(boot={self.boot}, counter={self.counter}, last_round={self.last_round})"


# ---------------------------------------------------------------- events
@dataclass(frozen=True, slots=True)
class Started:
    """The process is up and its saved state is loaded."""


@dataclass(frozen=True, slots=True)
class Connected:
    """The link to the broker is up and subscribed."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The link is down; the driver keeps trying."""


@dataclass(frozen=True, slots=True)
class Received:
    """A message arrived on `topic`."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Fetched:
    """The files of the bundle (with this manifest), or the one blob, are here, whole and verified."""

    sha256: bytes


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """A download failed for now (the driver already retried), or for good when `final`."""

    sha256: bytes
    reason: str
    final: bool = False


@dataclass(frozen=True, slots=True)
class Trained:
    """The delta of this round is on disk."""

    transcript: bytes
    loss_sum: float
    labels: int
    samples: int
    steps: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Sealed:
    """The masked report of this round is on disk, fsynced."""

    transcript: bytes
    digest: bytes
    size: int


@dataclass(frozen=True, slots=True)
class WorkFailed:
    """Training or sealing failed: no usable data, killed for memory, disk full."""

    transcript: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the board can do now, and whether its owner's policy lets it work. Told when any of it changes.

    `stay_seconds`: how long the device expects to stay; `reason` is for the owner's log only and never leaves.
    """

    allowed: bool
    stay_seconds: int
    facts: Facts
    reason: str = ""


@dataclass(frozen=True, slots=True)
class TimerFired:
    """A timer set by `SetTimer` ran out."""

    name: str


Event = (
    Started
    | Conditions
    | Connected
    | Disconnected
    | Received
    | Fetched
    | FetchFailed
    | Trained
    | Sealed
    | WorkFailed
    | TimerFired
)


# ---------------------------------------------------------------- effects
@dataclass(frozen=True, slots=True)
class Save:
    """Make this state durable before anything that follows."""

    state: AgentState


@dataclass(frozen=True, slots=True)
class Publish:
    """Send, quality of service 1."""

    topic: str
    payload: bytes
    retain: bool = False


@dataclass(frozen=True, slots=True)
class SendChunk:
    """Send one frame: `index` of the report on disk for this transcript."""

    topic: str
    transcript: Hash
    digest: Hash
    index: int


@dataclass(frozen=True, slots=True)
class FetchBundle:
    """Bring manifest and all files of a bundle here and verify them; answered by Fetched(manifest hash)."""

    announcement: Announcement


@dataclass(frozen=True, slots=True)
class FetchBlob:
    """Bring one content-addressed file here; answered by Fetched(its hash)."""

    url: str
    ref: BlobRef


@dataclass(frozen=True, slots=True)
class Train:
    """Train `steps` local steps from an adapter; the delta goes to disk under `transcript`."""

    transcript: bytes
    manifest: bytes
    publisher: bytes
    adapter: bytes
    training: Training
    steps: int
    data_seed: int
    depth: int = 0  # layers, from the top, whose adapters train; 0 = all


@dataclass(frozen=True, slots=True)
class Seal:
    """Build the masked report from the delta on disk (and the carry, when there is one).

    `roster` is (prekey, aes) of every member by position; `entropy` drives the stochastic rounding.
    """

    transcript: bytes
    codec: UpdateCodec
    position: int
    roster: tuple[tuple[bytes, bool], ...]
    prekey: bytes = field(repr=False)
    entropy: bytes = field(repr=False)
    loss_sum: float
    labels: int
    samples: int
    steps: int


@dataclass(frozen=True, slots=True)
class KeepCarry:
    """The round's update was not opened: what was to be sent becomes the carry of the next round."""

    transcript: bytes


@dataclass(frozen=True, slots=True)
class DropCarry:
    """The round's update was opened: erase it, the report and the old carry."""

    transcript: bytes


@dataclass(frozen=True, slots=True)
class StopWork:
    """Stop training or sealing for this transcript; its outcome is no longer wanted."""

    transcript: bytes


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Fire TimerFired(name) after `seconds`; replaces a running timer of that name."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class CancelTimer:
    """The timer is no longer wanted."""

    name: str


@dataclass(frozen=True, slots=True)
class Tell:
    """A line for the owner's log. `refusal` is the stable name when something was refused."""

    text: str
    refusal: str = ""


Effect = (
    Save
    | Publish
    | SendChunk
    | FetchBundle
    | FetchBlob
    | Train
    | Seal
    | KeepCarry
    | DropCarry
    | StopWork
    | SetTimer
    | CancelTimer
    | Tell
)
