"""Published vectors for every primitive, and our own known answers for keys, words, metadata and bodies.

`python tests/fedge/test_secagg_vectors.py` writes `secagg_vectors.json` anew: only when the wire format is changed on
purpose, and then with a new label in the key derivation. All inputs are chosen so that every product and sum of the
codec is exact in float32, hence the same words on every processor.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedge.secagg.bloc import BlocSum
from fedge.secagg.keystream import PIECE_BYTES, SPARE_BYTES, Keystream, StreamCipher
from fedge.secagg.masks import AGREEMENT, Member, edge_cipher, mask_in_place, open_edges
from fedge.update.codec import encode
from fedge.update.metadata import METADATA_WORDS
from fedge.update.report import BuiltReport, build_report, read_sum, report_layout
from fedge.update.spec import UpdateCodec

PATH = Path(__file__).with_name("secagg_vectors.json")
DEVICES, NUMBERS = 5, 2_048
H = hashlib.sha256(b"fedge known answers: transcript").digest()
SEED = hashlib.sha256(b"fedge known answers: rotation").digest()[:16]
SECRETS = [hashlib.sha256(b"fedge known answers: prekey %d" % i).digest() for i in range(DEVICES)]
ENTROPY = [hashlib.sha256(b"fedge known answers: entropy %d" % i).digest() for i in range(DEVICES)]
AES = (True, True, False, True, False)
ROSTER = [
    Member(prekey=X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw(), aes=aes)
    for secret, aes in zip(SECRETS, AES, strict=True)
]


def codec_of(bits: int) -> UpdateCodec:
    return UpdateCodec(bits=bits, step=2.0 if bits == 8 else 2.0**-4, clip=1024.0, seed=SEED)


def delta_of(device: int) -> np.ndarray:
    """Small whole numbers: their rotation is a multiple of 1/32 and the division by the step is exact."""
    return ((np.arange(NUMBERS) * 7_919 + device * 104_729) % 17 - 8).astype(np.float32)


def report_of(device: int, bits: int) -> BuiltReport:
    return build_report(
        delta_of(device),
        carry=None,
        loss_sum=1_000.5 + device,
        labels=300 + device,
        samples=20,
        steps=5,
        codec=codec_of(bits),
        h=H,
        position=device,
        roster=ROSTER,
        prekey_secret=SECRETS[device],
        entropy=ENTROPY[device],
    )


def plain_and_mask(device: int, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The device's words and metadata before masking (taken off with its own edges), and the mask of the words."""
    body = bytearray(report_of(device, bits).body)
    words, metadata = report_layout(NUMBERS, bits).views(body)
    masked = words.copy()
    edges = open_edges(H, device, ROSTER, SECRETS[device])
    mask_in_place(words, metadata, [type(edge)(adds=not edge.adds, stream=edge.stream) for edge in edges])
    return words, metadata, masked - words


def answers() -> dict[str, Any]:
    """Everything in the known-answer file, computed afresh."""
    return {
        "h": H.hex(),
        "rotation_seed": SEED.hex(),
        "prekey_secrets": [secret.hex() for secret in SECRETS],
        "prekeys": [member.prekey.hex() for member in ROSTER],
        "aes": list(AES),
        "entropy": [entropy.hex() for entropy in ENTROPY],
        "edge_keys": {
            f"{i}-{j}": {
                "cipher": edge_cipher(ROSTER[i], ROSTER[j]).value.decode(),
                "key": AGREEMENT.edge_key(
                    H,
                    SECRETS[i],
                    ROSTER[j].prekey,
                    edge_cipher(ROSTER[i], ROSTER[j]),
                ).hex(),
            }
            for i in range(DEVICES)
            for j in range(i + 1, DEVICES)
        },
        "reports": [device_answers(device, bits) for bits in (8, 16) for device in range(DEVICES)],
    }


def device_answers(device: int, bits: int) -> dict[str, Any]:
    words, metadata, mask = plain_and_mask(device, bits)
    return {
        "bits": bits,
        "device": device,
        "words_start": words[:64].tobytes().hex(),
        "words_sha256": hashlib.sha256(words.tobytes()).hexdigest(),
        "mask_start": mask[:64].tobytes().hex(),
        "mask_sha256": hashlib.sha256(mask.tobytes()).hexdigest(),
        "metadata": metadata.tobytes().hex(),
        "body_sha256": report_of(device, bits).digest.hex(),
    }


def test_known_answers() -> None:
    known = json.loads(PATH.read_text(encoding="utf-8"))
    fresh = answers()
    assert known.keys() == fresh.keys()
    for name, value in fresh.items():
        assert known[name] == value, name


@pytest.mark.parametrize("bits", [8, 16])
def test_the_known_reports_sum_to_the_known_updates(bits: int) -> None:
    bloc = BlocSum(H, [f"device-{i}" for i in range(DEVICES)], report_layout(NUMBERS, bits))
    for device in range(DEVICES):
        report = report_of(device, bits)
        assert hashlib.sha256(report.body).digest() == report.digest
        bloc.add(f"device-{device}", report.body)
    words, metadata = bloc.open()
    reading = read_sum(words, metadata, codec=codec_of(bits), devices=DEVICES, numbers=NUMBERS)
    assert reading.metadata.contributors == DEVICES
    assert reading.metadata.labels == sum(300 + i for i in range(DEVICES))
    assert reading.metadata.loss_sum == sum(1_000.5 + i for i in range(DEVICES))
    truth = sum(delta_of(i) for i in range(DEVICES))
    assert np.sqrt(np.mean((reading.total - truth) ** 2)) < codec_of(bits).step * np.sqrt(DEVICES) / 2


@pytest.mark.parametrize("bits", [8, 16])
def test_the_mask_covers_what_the_codec_wrote(bits: int) -> None:
    words, metadata, _ = plain_and_mask(2, bits)
    encoded = encode(delta_of(2), codec_of(bits), ENTROPY[2])
    assert np.array_equal(words, encoded.words)
    assert np.array_equal(metadata[METADATA_WORDS - encoded.strata.size :], encoded.strata)


def test_aes_128_ctr_of_sp_800_38a_f_5_1() -> None:
    key = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c")
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    cipher = bytes.fromhex(
        "874d6191b620e3261bef6864990db6ce9806f66b7970fdff8617187bb9fffdff"
        "5ae4df3edbd5d35e5b4f09020db03eab1e031dda2fbe03d1792170a0f3009cee"
    )
    start = bytes(range(0xF0, 0x100))
    stream = Keystream(StreamCipher.AES_128_CTR, key, start)
    assert bytes(a ^ b for a, b in zip(plain, stream.take(64), strict=True)) == cipher


def test_chacha20_of_rfc_8439_2_4_2() -> None:
    start = (1).to_bytes(4, "little") + bytes.fromhex("000000000000004a00000000")
    buffer = bytearray(PIECE_BYTES + SPARE_BYTES)
    noise = Keystream(StreamCipher.CHACHA20, bytes(range(32)), start).read(buffer, 114)
    plain = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you "
        b"only one tip for the future, sunscreen would be it."
    )
    assert bytes(a ^ b for a, b in zip(plain, bytes(noise), strict=False)) == bytes.fromhex(
        "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0b"
        "f91b65c5524733ab8f593dabcd62b3571639d624e65152ab8f530c359f0861d8"
        "07ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab7793736"
        "5af90bbf74a35be6b40b8eedf2785e42874d"
    )


def test_x25519_of_rfc_7748_6_1() -> None:
    alice = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    bob = bytes.fromhex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
    shared = X25519PrivateKey.from_private_bytes(alice).exchange(X25519PublicKey.from_public_bytes(bob))
    assert shared.hex() == "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"


def test_hkdf_of_rfc_5869_a_1() -> None:
    derived = HKDF(
        hashes.SHA256(),
        42,
        salt=bytes(range(13)),
        info=bytes(range(0xF0, 0xFA)),
    ).derive(b"\x0b" * 22)
    assert derived.hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )


def test_an_edge_key_is_hkdf_of_the_shared_secret_bound_to_the_transcript() -> None:
    secret = X25519PrivateKey.from_private_bytes(SECRETS[0])
    shared = secret.exchange(X25519PublicKey.from_public_bytes(ROSTER[2].prekey))
    info = b"fedge edge v1" + b"chacha20"
    expected = HKDF(hashes.SHA256(), 32, salt=H, info=info).derive(shared)
    assert AGREEMENT.edge_key(H, SECRETS[0], ROSTER[2].prekey, StreamCipher.CHACHA20) == expected


if __name__ == "__main__":
    PATH.write_text(json.dumps(answers(), indent=1) + "\n", encoding="utf-8")
