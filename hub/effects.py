"""What can happen to a hub (events), what it can ask for (effects), and the rows it keeps. Values only.

Effects are carried out in order; all `Save` effects of one event are one database transaction, committed before any
other effect of that event is released.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from fedge.lora import LAYER_PATH, LoraConfig
from fedge.messages import BlobRef, Training


# ---------------------------------------------------------------- rows (what survives a kill)
class CampaignRow(msgspec.Struct, frozen=True, kw_only=True):
    """One campaign: what the operator asked for and how far it is. `id` is the key."""

    id: str
    manifest: BlobRef
    manifest_signature: bytes
    publisher: bytes
    url: str
    lora: LoraConfig
    training: Training
    numbers: int  # how many travel in a round, probes and rounds of A apart
    rounds: int  # each bloc is opened this often
    steps: int  # planned local steps of a member in a round
    bloc_devices: int
    form_at_devices: int  # blocs are formed when this many are present
    window_seconds: int
    seed: int
    adapter: BlobRef
    adapter_version: int = 0
    sequence: int = 0
    # Largest of late of an opened sum, per number: tunes the next step; below 0: one has wrapped.
    spread: float = 0.0
    mean_norm: float = 0.0  # the largest of late of an opened sum's members: tunes the next clip
    closed: bool = False
    layers: int = 0  # of the model; 0 = not known, then every member adapts all of them
    # ---- what the rule needs to know of the bundle (fedge.rules); empty under `ffa`, where the mean is of vectors
    lora_shapes: dict[str, tuple[int, int]] = {}
    layer_path: str = LAYER_PATH
    dense: dict[str, tuple[int, ...]] = {}
    probes: bool = False  # the first opened sum makes the basis (rule `core`)
    spread_a: float = 0.0  # `spread` and `mean_norm` of the rounds in which A moves (rule `alternating`)
    mean_norm_a: float = 0.0
    # ---- the scheduler's knobs (hub.scheduler)
    work_seconds: float = 120.0  # target time of a member's part in a round
    training_devices_max: int = 0  # a bloc is opened while fewer devices train; 0 = no bound
    rest_seconds: float = 0.0  # of a bloc between two rounds
    quota: float = 0.0  # a bloc is opened at most quota x mean + 2 times; 0 = no bound
    form_seconds: float = 1_800.0  # newcomers wait at least this long for blocs of newcomers
    server_rate: float = 1.0  # 1 = the plain mean over the blocs that train side by side (ADR 6)
    normalise_steps: bool = False  # FedNova-style, from summed step counts only
    seconds_max: float = 0.0  # closes after this long, whatever is missing; 0 = when all rounds are done
    # ---- where it is
    # The end of its hash chain is announced; it never leaves the hub before its turn.
    beacon_secret: bytes = b""
    formations: int = 0
    formed_at: float = 0.0  # the first formation, Unix seconds; 0 = not yet
    started_at: float = 0.0
    checkin_seconds: int = 60  # how often a waiting device says READY
    starving: bool = False  # too few live blocs: nothing is opened until there are more
    mean_steps: float = 0.0  # a member's local steps in a round, running mean of opened sums
    reports_opened: int = 0
    reports_spoiled: int = 0  # accepted in rounds that sat out
    staleness: float = 0.0  # running mean over opened sums


class BlocRow(msgspec.Struct, frozen=True, kw_only=True):
    """One bloc of a campaign, fixed when formed. Key: (campaign, id)."""

    campaign: str
    id: str
    members: tuple[str, ...]
    card: bytes  # signed envelope
    round: int = 0  # number of the last OPEN
    opened: int = 0
    formed_at: float = 0.0
    formation: int = 1
    ended_at: float = 0.0  # when its last round ended, Unix seconds; 0 = never
    sat_out: int = 0  # rounds in a row of which nothing was opened
    opened_at: float = 0.0  # when a sum of it was last opened; 0 = never


class RoundRow(msgspec.Struct, frozen=True, kw_only=True):
    """One round of one bloc. Key: transcript. `sum` is the running sum and the set of members in it: one value."""

    transcript: bytes
    campaign: str
    bloc: str
    round: int
    envelope: bytes  # the signed OPEN
    base_version: int  # adapter version the members train from
    state: Literal["open", "opened", "sat-out"]
    sum: bytes  # fedge.secagg BlocSum, serialised; empty once opened or sat out
    opened_at: float  # when the OPEN was published, Unix seconds
    result: bytes = b""  # the signed RESULT envelope


class DeviceRow(msgspec.Struct, frozen=True, kw_only=True):
    """What the hub knows of one device: its newest READY counter. Key: id."""

    id: str
    counter: int = -1
    quarantined: str = ""
    blocked_seconds: float = 0.0  # how long its bloc waited for it alone
    failed: int = 0  # rounds that sat out because its report was missing


class LedgerEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the append-only ledger that people and reports read."""

    at: float
    kind: str  # ready, formed, open, report, opened, sat-out, adapter, refused, closed, …
    campaign: str = ""
    bloc: str = ""
    device: str = ""
    round: int = 0
    detail: dict[str, float | int | str] = {}


Row = CampaignRow | BlocRow | RoundRow | DeviceRow | LedgerEntry


# ---------------------------------------------------------------- events
class _Value(msgspec.Struct, frozen=True, gc=False):
    """Base of events and effects: made by the million in a simulation, so cheap to make, and never part of a cycle."""


class Started(_Value, frozen=True):
    """The process is up and the rows are loaded; `epoch` is new for every start."""

    epoch: int


class Received(_Value, frozen=True):
    """A message arrived; the broker vouches (by its ACL) that `topic` belongs to the sender."""

    topic: str
    payload: bytes


class CampaignAsked(_Value, frozen=True):
    """The operator starts a campaign."""

    campaign: CampaignRow


class TimerFired(_Value, frozen=True):
    """A timer set by `SetTimer` ran out."""

    name: str


Event = Started | Received | CampaignAsked | TimerFired


# ---------------------------------------------------------------- effects
class Save(_Value, frozen=True):
    """Insert or replace a row (append, for the ledger)."""

    row: Row


class StoreBlob(_Value, frozen=True):
    """Keep this content-addressed file (an adapter) durably, before the rows that name it."""

    ref: BlobRef
    data: bytes


class Publish(_Value, frozen=True):
    """Send, quality of service 1."""

    topic: str
    payload: bytes
    retain: bool = False


class SetTimer(_Value, frozen=True):
    """Fire TimerFired(name) after `seconds`; replaces a running timer of that name."""

    name: str
    seconds: float


class Tell(_Value, frozen=True):
    """A line for the operator's log. `refusal` is the stable name when something was refused."""

    text: str
    refusal: str = ""


Effect = Save | StoreBlob | Publish | SetTimer | Tell
