"""Every message between a device and a hub, one typed struct each.

A message that changes state travels in an *envelope*: its bytes, the sender's fleet certificate and an Ed25519
signature (`fedge.identity`). The SHA-256 of an OPEN's bytes is the round's transcript hash `h`; every mask, report
and receipt of that round is bound to it. Decoding refuses unknown fields and anything above the limits of
`fedge.limits` before it looks further.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from fedge import limits
from fedge.errors import ConfigError, DataError, ProtocolError, UnsupportedError
from fedge.lora import LoraConfig
from fedge.update.spec import UpdateCodec

Id = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]*\Z", max_length=limits.ID_CHARS_MAX)]
Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Key = Annotated[bytes, Meta(min_length=32, max_length=32)]
Seed = Annotated[bytes, Meta(min_length=16, max_length=16)]
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
Text = Annotated[str, Meta(max_length=limits.TEXT_CHARS_MAX)]
Name = Annotated[str, Meta(max_length=limits.NAME_CHARS_MAX)]
Count = Annotated[int, Meta(ge=0, le=2**62)]
Positive = Annotated[float, Meta(gt=0, le=1e3)]
Blob = Annotated[bytes, Meta(max_length=limits.MESSAGE_BYTES_MAX)]


class Message(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag=str.lower, kw_only=True
):
    """Base of all messages; the tag is the lower-case class name."""


class Envelope(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A signed message: `body` is an encoded Message, `certificate` an encoded fleet certificate."""

    body: Blob
    certificate: Annotated[bytes, Meta(max_length=2_048)]
    signature: Signature


class BlobRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A content-addressed file: fetched from `/b/<sha256>` and believed by its hash alone."""

    sha256: Hash
    size: Annotated[int, Meta(ge=0, le=limits.BUNDLE_FILE_BYTES_MAX)]


class Template(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How what is said becomes text: kind `chat` writes conversations as the bundle's model wants them, whole.

    Kind `text` takes each answer with what it answers; only the placeholders {prompt} and {completion} are replaced.
    A prompt longer than `prompt_chars_max` keeps its end; an empty one is `empty_prompt`.
    """

    prompt: Text = "Friend: {prompt}\nMe:"
    completion: Text = " {completion}"
    prompt_chars_max: Annotated[int, Meta(ge=1, le=100_000)] = 160
    empty_prompt: Text = "(start)"
    kind: Literal["text", "chat"] = "text"


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a device does with its data in a round, apart from how many steps: AdamW, fresh state.

    `rule` says which factors of the adapter move and what travels of them (`fedge.rules`); a device refuses a
    campaign whose rule it does not know.
    """

    rate: Positive = 0.016
    weight_decay: Annotated[float, Meta(ge=0, le=1)] = 0.01
    batch_rows: Annotated[int, Meta(ge=1, le=256)] = 4
    window_tokens: Annotated[int, Meta(ge=8, le=8_192)] = 64
    a_seed: Seed = bytes(16)
    data_seed: Count = 0
    template: Template = Template()
    rule: Name = "ffa"


class Announcement(Message, frozen=True):
    """hub -> everyone, retained, signed: what is being trained and where the newest adapter is."""

    campaign: Id
    hub: Id
    sequence: Count  # strictly increasing; an older announcement is ignored
    closed: bool
    url: Text  # base of the HTTPS server, for /b/<sha256>
    manifest: BlobRef
    manifest_signature: Signature
    publisher: Key
    lora: LoraConfig
    training: Training
    adapter: BlobRef
    adapter_version: Count
    beacon: Hash = bytes(32)  # commits to the beacons of all formations (fedge.formation)
    checkin_seconds: Annotated[int, Meta(ge=1, le=86_400)] = 60  # how often a waiting device says READY again


class Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The coarse public facts about a device. Nothing else about one device leaves in the clear."""

    board: Annotated[str, Meta(max_length=limits.BOARD_CHARS_MAX)] = "x86-64"
    memory_mb_step: Count = 0  # free memory, in steps of 256 MB
    seconds_per_step: Annotated[float, Meta(ge=0, le=1e6)] = 0.0  # 0 = not known yet; rounded to two digits
    samples_bucket: Annotated[int, Meta(ge=0, le=64)] = 0  # bit length of the sample count; 0 = no data
    metered: bool = False
    aes: bool = True  # AES instructions: masks with a peer that lacks them use ChaCha20
    power: Literal["mains", "charging", "battery"] = "mains"
    charge_quarter: Annotated[int, Meta(ge=0, le=4)] = 4  # battery, rounded down to quarters
    hot: bool = False  # throttled now
    link_bucket: Annotated[int, Meta(ge=0, le=32)] = (
        0  # bit length of the upload rate in kbit/s; 0 = not known yet
    )
    history_bucket: Annotated[int, Meta(ge=0, le=4)] = (
        0  # share of the last 7 days on: below 50, 70, 85, 95 %, more
    )
    rounds_left: bool = True  # the owner's budget of rounds is not spent
    version: Annotated[str, Meta(max_length=limits.VERSION_CHARS_MAX)] = ""  # of the agent


class Ready(Message, frozen=True):
    """device -> hub, signed: present, eligible and willing to stay; one fresh X25519 prekey per round.

    Said again when the facts change, under a higher counter and with the same prekey until a round has used it.
    `stay_seconds` 0 says: present, but not now.
    """

    campaign: Id
    device: Id
    counter: Count  # strictly increasing over the device's lifetime
    prekey: Key
    stay_seconds: Annotated[int, Meta(ge=0, le=limits.WINDOW_SECONDS_MAX)]
    facts: Facts


class BlocCard(Message, frozen=True):
    """hub -> bloc, signed: the fixed members of a bloc for a whole campaign. A device pins the first it accepts.

    How it was formed, and how a device checks that, is in `fedge.formation`.
    """

    campaign: Id
    bloc: Id
    members: Annotated[tuple[Id, ...], Meta(max_length=limits.BLOC_DEVICES_MAX)]
    beacon: Hash  # public randomness that broke ties when blocs were formed
    formation: Count = 1  # which formation of the campaign; the first is 1
    # The members' READY envelopes that were sorted, card order.
    roster: Annotated[tuple[Blob, ...], Meta(max_length=limits.BLOC_DEVICES_MAX)] = ()
    index: Count = 0  # of this bloc among the `blocs` of the formation
    blocs: Count = 1
    path: Annotated[tuple[Hash, ...], Meta(max_length=limits.PATH_HASHES_MAX)] = ()
    root: Hash = bytes(32)


class Open(Message, frozen=True):
    """hub -> bloc, signed: a round. `h` = SHA-256 of this message's bytes binds everything that follows."""

    campaign: Id
    bloc: Id
    card: Hash  # SHA-256 of the bloc card's bytes
    round: Annotated[int, Meta(ge=1, le=limits.ROUNDS_MAX)]  # strictly increasing for each bloc
    manifest: Hash
    adapter: BlobRef
    codec: UpdateCodec
    steps: Annotated[tuple[int, ...], Meta(max_length=limits.BLOC_DEVICES_MAX)]  # planned work, roster order
    roster: Annotated[
        tuple[Blob, ...], Meta(max_length=limits.BLOC_DEVICES_MAX)
    ]  # READY envelopes, card order
    window_seconds: Annotated[int, Meta(ge=1, le=limits.WINDOW_SECONDS_MAX)]
    # How many layers, from the top, each member adapts, roster order; empty or 0 = all.
    depths: Annotated[tuple[int, ...], Meta(max_length=limits.BLOC_DEVICES_MAX)] = ()


class Report(Message, frozen=True):
    """device -> hub, signed: offers a finished masked report; its bytes follow in chunks."""

    campaign: Id
    bloc: Id
    device: Id
    transcript: Hash
    digest: Hash  # SHA-256 of the masked bytes
    size: Annotated[int, Meta(ge=1, le=limits.TRANSFER_BYTES_MAX)]
    offer: Count = 0  # number of this offer; the receipt that answers it says so


class Decline(Message, frozen=True):
    """device -> hub, signed: will not report in this round; the bloc may sit out at once."""

    campaign: Id
    bloc: Id
    device: Id
    transcript: Hash
    reason: Name


class Receipt(Message, frozen=True):
    """hub -> device, signed: which chunks are here. `accepted` follows the hub's durable commit, nothing else does."""

    transcript: Hash
    digest: Hash
    have: Annotated[bytes, Meta(max_length=limits.TRANSFER_CHUNKS_MAX // 8)]
    accepted: bool = False
    refused: Name = ""
    offer: Count = 0  # the offer that this answers; 0 = none


UNKNOWN_ROUND: Final = "unknown-round"  # reason of a RESULT for a round that the hub has forgotten


class Result(Message, frozen=True):
    """hub -> bloc, signed: the bloc's sum was opened, or the bloc sat the round out."""

    campaign: Id
    bloc: Id
    round: Count
    transcript: Hash
    opened: bool
    reason: Name = ""


class Presence(Message, frozen=True):
    """device -> hub, retained, with a last will: up or down, and which boot says so (Sparkplug's bdSeq)."""

    device: Id
    up: bool
    boot: Count
    version: Name = ""


class HubState(Message, frozen=True):
    """hub -> everyone, retained, with a last will. A new epoch tells devices to say READY again."""

    hub: Id
    up: bool
    epoch: Count


AnyMessage = (
    Announcement | Ready | BlocCard | Open | Report | Decline | Receipt | Result | Presence | HubState
)
M = TypeVar("M", bound=Message)


class _Tag(msgspec.Struct):
    type: str


_encoder: Final = msgspec.msgpack.Encoder()
_tag_decoder: Final = msgspec.msgpack.Decoder(_Tag)
_decoder: Final = msgspec.msgpack.Decoder(AnyMessage)
_envelope_decoder: Final = msgspec.msgpack.Decoder(Envelope)


def encode(message: Message | Envelope) -> bytes:
    """The message's bytes (msgpack)."""
    # A copy of the right size: msgspec's own holds up to half as much again, and envelopes are kept for days.
    return bytes(memoryview(_encoder.encode(message)))


def decode(data: bytes, kind: type[M]) -> M:
    """The message of type `kind` in `data`.

    Raises ProtocolError: `malformed`, `oversize`, `unexpected`, `bad-codec`, `bad-lora`.
    """
    _check_size(data)
    try:
        message = _decoder.decode(data)
    except ConfigError as error:  # the codec checks itself when it is made
        raise ProtocolError("bad-codec", error.what, field=error.field, value=error.value) from error
    except (DataError, UnsupportedError) as error:  # and so does the adapter's config
        raise ProtocolError("bad-lora", error.what, field=error.field, value=error.value) from error
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(
            "malformed", "message cannot be read", field=kind.__name__, value=str(error)
        ) from error
    if not isinstance(message, kind):
        raise ProtocolError(
            "unexpected", f"expected {kind.__name__}", field="type", value=type(message).__name__
        )
    return message


def decode_envelope(data: bytes) -> Envelope:
    """The envelope in `data`, its signature not yet checked."""
    _check_size(data)
    try:
        return _envelope_decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError(
            "malformed", "envelope cannot be read", field="envelope", value=str(error)
        ) from error


def kind_in(body: bytes, kinds: Mapping[str, type[M]]) -> type[M]:
    """Which of `kinds` (by tag) a message's bytes claim to be; ProtocolError `malformed` or `unexpected`."""
    _check_size(body)
    try:
        tag = _tag_decoder.decode(body).type
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ProtocolError("malformed", "message cannot be read", value=str(error)) from error
    if tag not in kinds:
        raise ProtocolError(
            "unexpected",
            "no message for this topic",
            field="type",
            value=tag,
            hint=f"One of {', '.join(kinds)}.",
        )
    return kinds[tag]


def _check_size(data: bytes) -> None:
    if len(data) > limits.MESSAGE_BYTES_MAX:
        raise ProtocolError("oversize", "message is too large", field="bytes", value=len(data))
