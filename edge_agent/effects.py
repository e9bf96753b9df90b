"""What can happen to an agent (events) and what it can ask for (effects). Values only.

The real driver carries effects out with MQTT, files, a child process and the wall clock; the simulated one with a heap
of virtual time. Effects are carried out in order, and a `Save` is durable before the next one is touched.
"""

from __future__ import annotations

import msgspec

from fedge.messages import Announcement, BlobRef, Facts, Hash, Training
from fedge.update.spec import UpdateCodec


class AgentState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
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
class _Value(msgspec.Struct, frozen=True, gc=False):
    """Base of events and effects: made by the million in a simulation, so cheap to make, and never part of a cycle."""


class Started(_Value, frozen=True):
    """The process is up and its saved state is loaded."""


class Connected(_Value, frozen=True):
    """The link to the broker is up and subscribed."""


class Received(_Value, frozen=True):
    """A message arrived on `topic`."""

    topic: str
    payload: bytes


class Fetched(_Value, frozen=True):
    """The files of the bundle (with this manifest), or the one blob, are here, whole and verified."""

    sha256: bytes


class FetchFailed(_Value, frozen=True):
    """A download failed for now (the driver already retried), or for good when `final`."""

    sha256: bytes
    reason: str
    final: bool = False


class Trained(_Value, frozen=True):
    """The delta of this round is on disk."""

    transcript: bytes
    loss_sum: float
    labels: int
    samples: int
    steps: int
    seconds: float


class Sealed(_Value, frozen=True):
    """The masked report of this round is on disk, fsynced."""

    transcript: bytes
    digest: bytes
    size: int


class WorkFailed(_Value, frozen=True):
    """Training or sealing failed: no usable data, killed for memory, disk full.

    `name` is all that the hub hears of it; `reason` is for the owner.
    """

    transcript: bytes
    reason: str
    name: str = "work-failed"


class Conditions(_Value, frozen=True):
    """What the board can do now, and whether its owner's policy lets it work. Told when any of it changes.

    `stay_seconds`: how long the device expects to stay; `reason` is for the owner's log only and never leaves.
    """

    allowed: bool
    stay_seconds: int
    facts: Facts
    reason: str = ""


class TimerFired(_Value, frozen=True):
    """A timer set by `SetTimer` ran out."""

    name: str


Event = (
    Started
    | Conditions
    | Connected
    | Received
    | Fetched
    | FetchFailed
    | Trained
    | Sealed
    | WorkFailed
    | TimerFired
)


# ---------------------------------------------------------------- effects
class Save(_Value, frozen=True):
    """Make this state durable before anything that follows."""

    state: AgentState


class Publish(_Value, frozen=True):
    """Send, quality of service 1."""

    topic: str
    payload: bytes
    retain: bool = False


class SendChunk(_Value, frozen=True):
    """Send one frame: `index` of the report on disk for this transcript."""

    topic: str
    transcript: Hash
    digest: Hash
    index: int


class FetchBundle(_Value, frozen=True):
    """Bring manifest and all files of a bundle here and verify them; answered by Fetched(manifest hash)."""

    announcement: Announcement


class FetchBlob(_Value, frozen=True):
    """Bring one content-addressed file here; answered by Fetched(its hash)."""

    url: str
    ref: BlobRef


class Train(_Value, frozen=True):
    """Train `steps` local steps from an adapter; the delta goes to disk under `transcript`."""

    transcript: bytes
    manifest: bytes
    publisher: bytes
    adapter: bytes
    training: Training
    steps: int
    data_seed: int
    depth: int = 0  # layers, from the top, whose adapters train; 0 = all
    round: int = 1  # of the bloc: the campaign's rule may let another part move in each


class Seal(_Value, frozen=True):
    """Build the masked report from the delta on disk (and the carry, when there is one).

    `roster` is (prekey, aes) of every member by position; `entropy` drives the stochastic rounding.
    """

    transcript: bytes
    codec: UpdateCodec
    position: int
    roster: tuple[tuple[bytes, bool], ...]
    prekey: bytes
    entropy: bytes
    loss_sum: float
    labels: int
    samples: int
    steps: int

    def __repr__(self) -> str:
        """Without the two secrets."""
        return f"Seal({self.transcript.hex()})"


class KeepCarry(_Value, frozen=True):
    """The round's update was not opened: what was to be sent becomes the carry of the next round."""

    transcript: bytes


class DropCarry(_Value, frozen=True):
    """The round's update was opened: erase it, the report and the old carry."""

    transcript: bytes


class StopWork(_Value, frozen=True):
    """Stop training or sealing for this transcript; its outcome is no longer wanted."""

    transcript: bytes


class SetTimer(_Value, frozen=True):
    """Fire TimerFired(name) after `seconds`; replaces a running timer of that name."""

    name: str
    seconds: float


class CancelTimer(_Value, frozen=True):
    """The timer is no longer wanted."""

    name: str


class Tell(_Value, frozen=True):
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
