"""What the agent and its worker say to each other: one JSON object a line, each way.

The worker is a child process that does the heavy work and ends, so that the idle agent stays small; this module is
read by both and therefore knows no numpy. Paths are those of this device; bytes travel as base64.
"""

from __future__ import annotations

import msgspec

from edge_agent.dataset.choices import Reading
from edge_agent.planner import Plan
from fedge.messages import Training
from fedge.update.spec import UpdateCodec


class VerifiedStamp(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which files of a bundle were hashed and found right, and how they looked: inode, size, both times in ns."""

    manifest_sha256: bytes
    looks: dict[str, tuple[int, int, int, int]]


class Counts(msgspec.Struct, frozen=True):
    """What became of a data file. `examples` = `kept` + `too_long` + `empty`."""

    records: int = 0
    examples: int = 0
    kept: int = 0
    too_long: int = 0  # does not fit the window
    empty: int = 0  # nothing to learn: the completion has no text
    turns_unused: int = 0
    shortened: int = 0  # kept with the beginning of the prompt, or the end of a labelled text, left out
    bad: int = 0  # records that could not be read and that the owner lets pass
    trimmed: int = 0  # turns whose white space at an end the model's chat template does not write


class Memory(msgspec.Struct, frozen=True):
    """Of the worker, in bytes: the highest resident size so far, and the anonymous part now."""

    peak: int = 0
    anonymous: int = 0


# ---------------------------------------------------------------- agent -> worker
class BundleJob(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="command", tag=str.lower
):
    """What every job over a bundle names. Hashes pin what is used; `threads` is the owner's cap.

    With `slot_count`, the job first waits for a training slot in the folder `slots` (`edge_agent.slots`). `plan` is
    how a step is carried out; `scratch` is a folder where it may keep checkpoints, "" = the system's.
    """

    bundle: str
    training: Training
    manifest: bytes | None = None
    publisher: bytes | None = None
    verified: VerifiedStamp | None = None
    threads: int = 1
    slots: str = ""
    slot_count: int = 0
    plan: Plan = Plan()
    scratch: str = ""


class Job(BundleJob, frozen=True, kw_only=True):
    """The same, over an adapter and a data file. `reading` is what the owner says about that file."""

    adapter: str  # little-endian float32, in layout order
    data: str
    adapter_sha256: bytes | None = None
    reading: Reading = Reading()


class Gauge(BundleJob, frozen=True):
    """Time a step of the campaign's shape, all layers, on made-up tokens. No data file and no adapter is touched."""


class Train(Job, frozen=True):
    """Train `steps` local steps and write what travels (little-endian float32) to the file `delta`.

    What that is, and in which order, says the campaign's rule for round number `round` of the bloc. Only the top
    `depth` layers move, 0 = all, `depth.HEAD_ONLY` = none but the head. The order of rows follows `data_seed`; `start`
    batches of that order are passed over.
    In the file `state`, "" = none, the job keeps what it has done, at most once in `state_seconds`: the same job begun
    again after it was cut off goes on from there, and ends with the same bits.
    """

    delta: str
    steps: int
    data_seed: int = 0
    start: int = 0
    depth: int = 0
    round: int = 1
    state: str = ""
    state_seconds: float = 60.0  # flash cards wear out, and a state has three times the adapter's bytes


class Personalise(Job, frozen=True):
    """Take own steps on A and B, and keep what the rows of the file `held_out` like best (edge_agent.personal).

    The adapter file is one of the rule `fedit`, and so is the file `out`, which is written when the fleet's own adapter
    is not the best. `alone_steps` begin from the base model; none = nothing is trained alone.
    """

    held_out: str
    out: str
    steps: tuple[int, ...]
    data_seed: int = 0
    alone_steps: tuple[int, ...] = ()


class Evaluate(Job, frozen=True):
    """The loss of every usable row of `data`."""


class Seal(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="command", tag="seal"
):
    """Build the masked report of `transcript` from the file `delta`, and the file `carry` when one is named.

    Writes `sent` (float32: what the report carries) and `report`. `roster` is (prekey, has AES instructions) by
    position; `prekey` and `entropy` are secret, so a job is never logged.
    """

    transcript: bytes
    delta: str
    carry: str
    sent: str
    report: str
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
        return f"Seal({self.transcript.hex()})"


# ---------------------------------------------------------------- worker -> agent
class Answer(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag=str.lower):
    """Base of the answers; each job ends with one that is not Progress."""


class Progress(Answer, frozen=True):
    """A step, or a batch of an evaluation, is done."""

    done: int
    of: int
    loss_sum: float
    labels: int
    memory: Memory


class Trained(Answer, frozen=True):
    """The delta is durably on disk. `samples` = usable rows in the data file, `rows` = rows trained on."""

    loss_sum: float
    labels: int
    samples: int
    rows: int
    steps: int
    skipped: int
    not_finite: int
    seconds: float  # wall time of the steps alone
    counts: Counts
    verified: VerifiedStamp
    memory: Memory


class Personalised(Answer, frozen=True):
    """`kept` names the candidate that was best; `tried` has the held-out loss of each in nats per label."""

    kept: str
    own: bool  # own steps were kept, and the file `out` is there
    tried: dict[str, float]
    held_out_rows: int
    samples: int
    verified: VerifiedStamp
    memory: Memory


class Evaluated(Answer, frozen=True):
    """`nll` (nats) and `row_labels` for each usable row, in the order of the file."""

    loss_sum: float
    labels: int
    nll: list[float]
    row_labels: list[int]
    counts: Counts
    verified: VerifiedStamp
    memory: Memory
    # Whether the first choice for a row is its class, or for a pair its own text in the batch.
    right: list[bool] = []


class Gauged(Answer, frozen=True):
    """`seconds` = wall time of one step, without the wait for a slot and without loading."""

    seconds: float
    verified: VerifiedStamp
    memory: Memory


class Sealed(Answer, frozen=True):
    """The masked report is durably on disk: its SHA-256 and its size in bytes."""

    digest: bytes
    size: int


class Failed(Answer, frozen=True):
    """The job left nothing behind. `error` is the class in `fedge.errors`, or the name of an unforeseen one."""

    error: str
    what: str
    field: str = ""
    hint: str = ""
    exit_code: int = 70
