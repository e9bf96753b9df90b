"""Every message: known answers, round trips, limits. Hostile bytes are in `test_message_bytes`.

`message_vectors.json` holds the bytes of one of each (fixed keys and fields, hexadecimal). They are the wire format:
a change that alters them breaks every device in the field. When that is meant, write them anew with
`PYTHONPATH=.:tests python tests/fedge/test_messages.py` and say so in the changelog.
"""

import json
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge import limits, messages
from fedge.errors import ProtocolError
from fedge.frames import ChunkHeader, encode_frame
from fedge.identity import FleetCertificate, Signer, Verifier, sign_certificate
from fedge.joining import JoinReply, JoinRequest, JoinToken
from fedge.lora import LoraConfig
from fedge.messages import (
    Announcement,
    BlobRef,
    BlocCard,
    Decline,
    Envelope,
    Facts,
    HubState,
    Message,
    Open,
    Presence,
    Ready,
    Receipt,
    Report,
    Result,
    Template,
    Training,
    decode,
    decode_envelope,
    encode,
    kind_in,
)
from fedge.update.spec import UpdateCodec

FILE = Path(__file__).with_name("message_vectors.json")
NOW = 1_800_000_000
ROOT = Ed25519PrivateKey.from_private_bytes(b"\1" * 32)
KEY = Ed25519PrivateKey.from_private_bytes(b"\2" * 32)
CERTIFICATE = FleetCertificate(
    "test", "d00", "device", KEY.public_key().public_bytes_raw(), 7, NOW, NOW + 86_400
)
SIGNED = sign_certificate(CERTIFICATE, ROOT)
H, D, PREKEY = b"\3" * 32, b"\4" * 32, b"\5" * 32
FACTS = Facts("rpi-5", 12, 1.5, 9, True, False, "battery", 3, True, 11, 2, False, "0.3.0")
READY = Ready(campaign="c1", device="d00", counter=3, prekey=PREKEY, stay_seconds=3_600, facts=FACTS)
CODEC = UpdateCodec(bits=8, step=0.25, clip=1.5, seed=bytes(range(16)))
MESSAGES: tuple[Message, ...] = (
    Announcement(
        campaign="c1",
        hub="hub",
        sequence=5,
        closed=False,
        url="https://hub:8443",
        manifest=BlobRef(H, 4_000),
        manifest_signature=b"\6" * 64,
        publisher=b"\7" * 32,
        lora=LoraConfig(),
        training=Training(template=Template("{prompt}", "{completion}", 9, "-")),
        adapter=BlobRef(D, 737_280),
        adapter_version=4,
        beacon=PREKEY,
        checkin_seconds=960,
    ),
    READY,
    BlocCard(
        campaign="c1",
        bloc="bloc-0",
        members=("d00", "d01", "d02", "d03", "d04"),
        beacon=H,
        formation=2,
        roster=(b"ready-0", b"ready-1"),
        index=1,
        blocs=3,
        path=(H, D),
        root=PREKEY,
    ),
    Open(
        campaign="c1",
        bloc="bloc-0",
        card=H,
        round=2,
        manifest=H,
        adapter=BlobRef(D, 737_280),
        codec=CODEC,
        steps=(5, 5),
        roster=(b"ready-0", b"ready-1"),
        window_seconds=600,
        depths=(0, 12),
    ),
    Report(campaign="c1", bloc="bloc-0", device="d00", transcript=H, digest=D, size=184_604),
    Decline(campaign="c1", bloc="bloc-0", device="d00", transcript=H, reason="work-failed"),
    Receipt(transcript=H, digest=D, have=b"\x07", accepted=True, refused=""),
    Result(campaign="c1", bloc="bloc-0", round=2, transcript=H, opened=False, reason="window-over"),
    Presence(device="d00", up=True, boot=9, version="0.1.0"),
    HubState(hub="hub", up=True, epoch=12),
)


def vectors() -> dict[str, str]:
    """The bytes of one of each, by name."""
    found = {type(message).__name__.lower(): encode(message) for message in MESSAGES}
    found["certificate"] = SIGNED
    found["envelope"] = Signer(KEY, SIGNED).seal(READY)
    found["frame"] = encode_frame(ChunkHeader(H, D, 2), b"sixty kilobytes of words")
    found["join-token"] = JoinToken("https://hub:8443", H, b"\1" * 20).text().encode()
    found["join-request"] = msgspec.msgpack.encode(JoinRequest(b"\1" * 20, "PEM", PREKEY, "kitchen"))
    reply = JoinReply("test", "d00", H, "PEM", SIGNED, "hub", 8_883)
    found["join-reply"] = msgspec.msgpack.encode(reply)
    return {name: data.hex() for name, data in found.items()}


# ---------------------------------------------------------------- known answers
@pytest.mark.parametrize("name", list(vectors()))
def test_the_wire_format_is_what_it_was(name: str) -> None:
    assert vectors()[name] == json.loads(FILE.read_text())[name]


def test_there_is_a_vector_for_every_message_and_none_besides() -> None:
    assert list(json.loads(FILE.read_text())) == list(vectors())
    assert {type(message) for message in MESSAGES} == set(get_args(messages.AnyMessage))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_stored_message_reads_back(message: Message) -> None:
    stored = bytes.fromhex(json.loads(FILE.read_text())[type(message).__name__.lower()])
    assert decode(stored, type(message)) == message
    with pytest.raises(ProtocolError) as refusal:
        decode(stored, HubState if not isinstance(message, HubState) else Ready)
    assert refusal.value.name == "unexpected"


def test_a_stored_envelope_still_verifies() -> None:
    stored = bytes.fromhex(json.loads(FILE.read_text())["envelope"])
    verifier = Verifier("test", ROOT.public_key().public_bytes_raw())
    opened = verifier.open(stored, Ready, role="device", now=NOW)
    assert (opened.subject, opened.message) == ("d00", READY)


# ---------------------------------------------------------------- round trips
identifiers = st.from_regex(messages.Id.__metadata__[0].pattern, fullmatch=True).filter(
    lambda text: len(text) <= limits.ID_CHARS_MAX
)
texts = st.text(st.characters(codec="utf-8"), max_size=20)
hashes = st.binary(min_size=32, max_size=32)
counts = st.integers(0, 2**62)
refs = st.builds(BlobRef, hashes, st.integers(0, limits.BUNDLE_FILE_BYTES_MAX))
facts = st.builds(
    Facts,
    texts,
    counts,
    st.floats(0, 1e6),
    st.integers(0, 64),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["mains", "charging", "battery"]),
    st.integers(0, 4),
    st.booleans(),
    st.integers(0, 32),
    st.integers(0, 4),
    st.booleans(),
    texts,
)
codecs = st.builds(
    UpdateCodec,
    bits=st.sampled_from(limits.RING_BITS),
    step=st.floats(1e-3, 1e3),
    clip=st.floats(1e-6, 1e3),
    seed=st.binary(min_size=16, max_size=16),
)
trainings = st.builds(Training, rate=st.floats(1e-9, 10), a_seed=st.binary(min_size=16, max_size=16))
envelopes = st.lists(st.binary(max_size=40), max_size=64).map(tuple)
bloc = {"campaign": identifiers, "bloc": identifiers}
reporting = {**bloc, "device": identifiers, "transcript": hashes}
STRATEGIES: dict[type[Message], st.SearchStrategy[Message]] = {
    Announcement: st.builds(
        Announcement,
        campaign=identifiers,
        hub=identifiers,
        sequence=counts,
        closed=st.booleans(),
        url=texts,
        manifest=refs,
        manifest_signature=st.binary(min_size=64, max_size=64),
        publisher=hashes,
        lora=st.builds(LoraConfig, st.integers(1, 64), st.floats(0, 100), st.lists(texts).map(tuple)),
        training=trainings,
        adapter=refs,
        adapter_version=counts,
        beacon=hashes,
        checkin_seconds=st.integers(1, 86_400),
    ),
    Ready: st.builds(
        Ready,
        campaign=identifiers,
        device=identifiers,
        counter=counts,
        prekey=hashes,
        stay_seconds=st.integers(0, limits.WINDOW_SECONDS_MAX),
        facts=facts,
    ),
    BlocCard: st.builds(
        BlocCard,
        **bloc,
        members=st.lists(identifiers, max_size=64).map(tuple),
        beacon=hashes,
        formation=counts,
        roster=envelopes,
        index=counts,
        blocs=counts,
        path=st.lists(hashes, max_size=32).map(tuple),
        root=hashes,
    ),
    Open: st.builds(
        Open,
        **bloc,
        card=hashes,
        round=st.integers(1, limits.ROUNDS_MAX),
        manifest=hashes,
        adapter=refs,
        codec=codecs,
        steps=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=64).map(tuple),
        roster=envelopes,
        window_seconds=st.integers(1, limits.WINDOW_SECONDS_MAX),
        depths=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=64).map(tuple),
    ),
    Report: st.builds(Report, **reporting, digest=hashes, size=st.integers(1, limits.TRANSFER_BYTES_MAX)),
    Decline: st.builds(Decline, **reporting, reason=texts),
    Receipt: st.builds(
        Receipt,
        transcript=hashes,
        digest=hashes,
        have=st.binary(max_size=8),
        accepted=st.booleans(),
        refused=texts,
    ),
    Result: st.builds(Result, **bloc, round=counts, transcript=hashes, opened=st.booleans(), reason=texts),
    Presence: st.builds(Presence, device=identifiers, up=st.booleans(), boot=counts, version=texts),
    HubState: st.builds(HubState, hub=identifiers, up=st.booleans(), epoch=counts),
}


@given(message=st.one_of(STRATEGIES.values()))
@settings(max_examples=300, deadline=None)
def test_decoding_undoes_encoding(message: Message) -> None:
    assert decode(encode(message), type(message)) == message
    assert kind_in(encode(message), {"x": HubState, type(message).__name__.lower(): type(message)}) is type(
        message
    )


@given(
    body=st.binary(max_size=500),
    certificate=st.binary(max_size=500),
    signature=st.binary(min_size=64, max_size=64),
)
@settings(deadline=None)
def test_decoding_undoes_encoding_of_envelopes(body: bytes, certificate: bytes, signature: bytes) -> None:
    envelope = Envelope(body, certificate, signature)
    assert decode_envelope(encode(envelope)) == envelope


# ---------------------------------------------------------------- limits
def raw(message: Message, **changes: object) -> bytes:
    return msgspec.msgpack.encode({**msgspec.msgpack.decode(encode(message)), **changes})


BY_TYPE = {type(message): message for message in MESSAGES}


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (Ready, "surplus", 1),
        (Ready, "prekey", bytes(31)),
        (Ready, "device", "Upper"),
        (Ready, "device", "d" * 65),
        (Ready, "device", "d00\n"),
        (Ready, "counter", -1),
        (Ready, "facts", {"seconds_per_step": float("nan")}),
        (Ready, "facts", {"seconds_per_step": float("inf")}),
        (Ready, "facts", {"where": "kitchen"}),
        (Ready, "facts", {"power": "nuclear"}),
        (Ready, "facts", {"board": "b" * 65}),
        (Ready, "facts", {"version": "v" * 33}),
        (Ready, "facts", {"charge_quarter": 5}),
        (Ready, "facts", {"link_bucket": 33}),
        (BlocCard, "members", ["d"] * 65),
        (BlocCard, "roster", [b""] * 65),
        (BlocCard, "path", [bytes(32)] * 33),
        (BlocCard, "root", bytes(31)),
        (Open, "round", 0),
        (Open, "steps", [1] * 65),
        (Open, "depths", [1] * 65),
        (Open, "window_seconds", 8 * 86_400),
        (Report, "size", limits.TRANSFER_BYTES_MAX + 1),
        (Report, "size", 0),
        (Receipt, "have", bytes(9)),
        (Decline, "reason", "x" * 129),
        (Announcement, "training", {"rate": float("inf")}),
        (Announcement, "training", {"rate": 0.0}),
        (Announcement, "url", "x" * 2_049),
        (Announcement, "checkin_seconds", 0),
        (Announcement, "beacon", bytes(33)),
    ],
)
def test_a_value_past_its_limit_is_malformed(kind: type[Message], field: str, value: object) -> None:
    assert decode(raw(BY_TYPE[kind]), kind) == BY_TYPE[kind]
    with pytest.raises(ProtocolError) as refusal:
        decode(raw(BY_TYPE[kind], **{field: value}), kind)
    assert refusal.value.name == "malformed"


def test_a_codec_that_contradicts_itself_is_named() -> None:
    codec = {"bits": 12, "step": 0.25, "clip": 1.5, "seed": bytes(16)}
    with pytest.raises(ProtocolError) as refusal:
        decode(raw(BY_TYPE[Open], codec=codec), Open)
    assert (refusal.value.name, refusal.value.field) == ("bad-codec", "bits")


def test_a_message_above_the_limit_is_not_even_looked_at() -> None:
    for reader in (lambda data: decode(data, Open), decode_envelope, lambda data: kind_in(data, {})):
        with pytest.raises(ProtocolError) as refusal:
            reader(bytes(limits.MESSAGE_BYTES_MAX + 1))
        assert refusal.value.name == "oversize"


def test_a_full_roster_fits_a_message() -> None:
    """64 members, each with a READY of the largest names: the reason for MESSAGE_BYTES_MAX."""
    certificate = sign_certificate(
        msgspec.structs.replace(CERTIFICATE, fleet="f" * 128, subject="d" * 64), ROOT
    )
    largest = msgspec.structs.replace(FACTS, board="b" * 64, version="v" * 32, memory_mb_step=2**62)
    ready = msgspec.structs.replace(READY, campaign="c" * 64, device="d" * 64, counter=2**62, facts=largest)
    roster = (Signer(KEY, certificate).seal(ready),) * 64
    opening = msgspec.structs.replace(
        BY_TYPE[Open], roster=roster, steps=(10_000,) * 64, depths=(1_000,) * 64
    )
    card = msgspec.structs.replace(
        BY_TYPE[BlocCard], roster=roster, members=("d" * 64,) * 64, path=(H,) * 32, blocs=2**32, index=2**31
    )
    for message in (opening, card):
        sealed = Signer(KEY, certificate).seal(message)
        assert decode(decode_envelope(sealed).body, type(message)) == message


if __name__ == "__main__":
    FILE.write_text(json.dumps(vectors(), indent=1) + "\n")
