"""Identities and key agreement of a simulated fleet: the real ones, or hashes that keep what the laws rest on.

A hashed signature is a keyed BLAKE2b (RFC 7693) of the message: whoever has not the world's secret cannot make one, so
forgeries fail as they should. A hashed agreement gives both ends of an edge the same key and everybody else another
one, so masks cancel in the whole sum and in nothing less. What is signed and masked, and every byte around it, is the
shipped code's. An envelope that hundreds of devices read is checked once: its outcome is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Final, Generic, Literal, TypeVar, cast

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedge.identity import FleetCertificate, Opened, Role, Signer, Verifier, sign_certificate
from fedge.messages import Message, decode_envelope, kind_in
from fedge.secagg.keystream import PIECE_BYTES, Keystream, StreamCipher
from fedge.secagg.masks import AGREEMENT, Agreement
from firmware_sim.world.clock import START
from firmware_sim.world.streams import Stream

HUB: Final = -1
FLEET: Final = "world"
# Up to here `auto` means real: an X25519 exchange costs 50 us, a round of eight 28 pairs.
REAL_DEVICES_MAX: Final = 24
_VALID: Final = (int(START) - 86_400, int(START) + 3_660 * 86_400)
_REMEMBERED: Final = 1_024  # envelopes in each half of a verifier's memory
_SPEAKERS: Final = 2_048
NOISE_BYTES: Final = 2**20
_ROOT: Final = "/root"  # no subject has this name

M = TypeVar("M", bound=Message)
Kind = Literal["real", "hashed"]


def name_of(number: int) -> str:
    """The device's name on the wire; the hub's for -1."""
    return "hub" if number == HUB else f"d{number:06d}"


@dataclass(frozen=True, slots=True)
class Identities:
    """Who is who in one world. `signer(number)` speaks as that device, or as the hub for -1."""

    kind: Kind
    signer: Callable[[int], Signer]
    verifier: Callable[[frozenset[int]], Verifier]
    agreement: Agreement


def identities(kind: Kind, seed: int) -> Identities:
    """The identities of the world of this seed."""
    return _real(seed) if kind == "real" else _hashed(seed)


def serial_of(number: int) -> int:
    """The serial number of a subject's certificate."""
    return number + 2


def _certificate(number: int, public: bytes) -> FleetCertificate:
    role: Role = "hub" if number == HUB else "device"
    return FleetCertificate(FLEET, name_of(number), role, public, serial_of(number), *_VALID)


# ---------------------------------------------------------------- real
def _real(seed: int) -> Identities:
    root = Ed25519PrivateKey.from_private_bytes(Stream(seed, "fleet root").bytes(32))

    def signer(number: int) -> Signer:
        key = Ed25519PrivateKey.from_private_bytes(Stream(seed, number, "identity").bytes(32))
        found = _certificate(number, key.public_key().public_bytes_raw())
        return Signer(key, sign_certificate(found, root))

    public = root.public_key().public_bytes_raw()
    return Identities("real", signer, lambda revoked: Verifier(FLEET, public, revoked), AGREEMENT)


# ---------------------------------------------------------------- hashed
def _hashed(seed: int) -> Identities:
    secret = Stream(seed, "world secret").bytes(32)
    return Identities(
        "hashed",
        lambda number: HashedSigner(secret, number),
        lambda revoked: HashedVerifier(secret, revoked),
        HashedAgreement(secret),
    )


def _public_key(secret: bytes, subject: bytes) -> bytes:
    return blake2b(subject, digest_size=32, key=secret, person=b"public key").digest()


def _signature(begun: blake2b, data: bytes) -> bytes:
    """That of `data` by whose key `begun` has taken in; a copy of what was begun costs half of beginning anew."""
    mac = begun.copy()
    mac.update(data)
    return mac.digest()


@lru_cache(maxsize=_SPEAKERS)
def _begun(secret: bytes, public: bytes) -> blake2b:
    return blake2b(public, key=secret, person=b"signature")


class _HashedKey:
    """Signs as a private key does; `public` is what a certificate says of it."""

    __slots__ = ("_begun", "public")

    def __init__(self, secret: bytes, subject: str) -> None:
        self.public = _public_key(secret, subject.encode())
        self._begun = _begun(secret, self.public)

    def sign(self, data: bytes) -> bytes:
        return _signature(self._begun, data)


class HashedSigner(Signer):
    """Speaks for one subject; all that it keeps is two references, whatever the fleet's size."""

    __slots__ = ("_number", "_secret")
    _number: int
    _secret: bytes

    def __init__(self, secret: bytes, number: int) -> None:
        object.__setattr__(self, "_secret", secret)
        object.__setattr__(self, "_number", number)

    @property
    def certificate(self) -> bytes:
        """Made when it is asked for: those of 100,000 devices would take 25 MB."""
        return _speaker(self._secret, self._number)[1]

    def sign(self, data: bytes) -> bytes:
        """A keyed hash for a signature."""
        return _speaker(self._secret, self._number)[0].sign(data)


@lru_cache(maxsize=_SPEAKERS)
def _speaker(secret: bytes, number: int) -> tuple[_HashedKey, bytes]:
    """Key and certificate of a subject; those who spoke last are kept."""
    key = _HashedKey(secret, name_of(number))
    root = cast(Ed25519PrivateKey, _HashedKey(secret, _ROOT))
    return key, sign_certificate(_certificate(number, key.public), root)


class HashedVerifier(Verifier):
    """Checks hashed signatures. What it found good it knows again by the envelope's bytes, whoever asks."""

    __slots__ = ("_certificates", "_opened", "_secret")
    _certificates: _Memory[FleetCertificate]
    _opened: _Memory[tuple[Opened[Message], FleetCertificate]]
    _secret: bytes

    def __init__(self, secret: bytes, revoked: frozenset[int]) -> None:
        super().__init__(FLEET, _public_key(secret, _ROOT.encode()), revoked)
        object.__setattr__(self, "_secret", secret)
        object.__setattr__(self, "_certificates", _Memory())
        object.__setattr__(self, "_opened", _Memory())

    def check_signature(self, public_key: bytes, signature: bytes, data: bytes) -> None:
        """InvalidSignature unless the holder of the world's secret signed `data` for this key."""
        if _signature(_begun(self._secret, public_key), data) != signature:
            raise InvalidSignature

    def certificate(self, data: bytes, *, role: Role, now: float) -> FleetCertificate:
        """As the shipped verifier's, and remembered, too."""
        found = self._certificates.get(data)
        if found is None:
            found = super().certificate(data, role=role, now=now)
            self._certificates.put(data, found)
        else:
            self.require_valid(found, role, now)
        return found

    def open(self, data: bytes, kind: type[M], *, role: Role, now: float) -> Opened[M]:
        """As the shipped verifier's; role, revocation and validity are looked at every time."""
        known = self._opened.get(data)
        if known is None or type(known[0].message) is not kind:
            return self._remembered(data, kind, role, now)
        self.require_valid(known[1], role, now)
        return cast("Opened[M]", known[0])

    def open_any(self, data: bytes, kinds: Mapping[str, type[M]], *, role: Role, now: float) -> Opened[M]:
        """As the shipped verifier's; role, revocation and validity are looked at every time."""
        known = self._opened.get(data)
        if known is None or type(known[0].message) not in kinds.values():
            return self._remembered(data, kinds, role, now)
        self.require_valid(known[1], role, now)
        return cast("Opened[M]", known[0])

    def _remembered(
        self, data: bytes, kinds: type[M] | Mapping[str, type[M]], role: Role, now: float
    ) -> Opened[M]:
        envelope = decode_envelope(data)
        kind = kinds if isinstance(kinds, type) else kind_in(envelope.body, kinds)
        found = self._checked(envelope, kind, role, now)
        self._opened.put(data, cast("tuple[Opened[Message], FleetCertificate]", found))
        return found[0]


Known = TypeVar("Known")


class _Memory(Generic[Known]):
    """The last few thousand outcomes: two halves, the older of which is forgotten as a whole."""

    __slots__ = ("_new", "_old")

    def __init__(self) -> None:
        self._new: dict[bytes, Known] = {}
        self._old: dict[bytes, Known] = {}

    def get(self, data: bytes) -> Known | None:
        return self._new.get(data) or self._old.get(data)

    def put(self, data: bytes, known: Known) -> None:
        if len(self._new) >= _REMEMBERED:
            self._old, self._new = self._new, {}
        self._new[data] = known


class HashedAgreement(Agreement):
    """Both ends of an edge hash both public keys with the world's secret; no third device can."""

    def __init__(self, secret: bytes) -> None:
        self._begun_prekey = blake2b(digest_size=32, key=secret, person=b"prekey")
        self._begun_edge = blake2b(digest_size=32, key=secret, person=b"edge")
        self._newest = (b"", b"")  # a secret and its prekey: a device asks again for each edge
        noise = Keystream(StreamCipher.CHACHA20, secret).take(NOISE_BYTES)
        self._noise = memoryview(noise + noise[:PIECE_BYTES])

    def public(self, secret: bytes) -> bytes:
        """The prekey of a secret."""
        known, prekey = self._newest
        if known != secret:
            begun = self._begun_prekey.copy()
            begun.update(secret)
            prekey = begun.digest()
            self._newest = secret, prekey
        return prekey

    def edge_key(self, h: bytes, secret: bytes, other: bytes, cipher: StreamCipher) -> bytes:
        """The edge's key, the same at both ends, another one under every transcript hash."""
        own = self.public(secret)
        begun = self._begun_edge.copy()
        begun.update(h + (own + other if own < other else other + own) + cipher.value)
        return begun.digest()[: cipher.key_bytes]

    def stream(self, cipher: StreamCipher, key: bytes) -> Keystream:
        """A window of one table of noise: to set a cipher up for a kilobyte takes longer than all else of a mask."""
        # At a multiple of 4: numpy adds words that lie elsewhere at a third of the pace.
        return NoiseStream(self._noise, int.from_bytes(key[:8], "little") % NOISE_BYTES & ~3)


class NoiseStream(Keystream):
    """Reads a table of random bytes round and round, from the place that a key says, without copying them."""

    __slots__ = ("_at", "_table")

    def __init__(self, table: memoryview, at: int) -> None:
        """`table`: NOISE_BYTES, and their first PIECE_BYTES once more, so that no piece is cut by the end."""
        self._table, self._at = table, at

    def read(self, buffer: bytearray, count: int) -> memoryview:
        """A view that begins with the next `count` bytes; `buffer` is left alone."""
        at = self._at
        self._at = (at + count) % NOISE_BYTES
        return self._table[at : at + count]
