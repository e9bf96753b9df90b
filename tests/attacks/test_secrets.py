"""Prekeys, entropy and private keys never appear where somebody could read them: repr, str, logs, errors, messages."""

import pytest
from adversary import Bench
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from playbook import Fleet, authority, campaign, entropy_from

from edge_agent import effects as device_effects
from fedge.authority import new_authority, p256_key
from fedge.errors import FedgeError
from fedge.joining import JoinRequest, JoinToken
from hub import effects as hub_effects


def shown(secret: bytes, *texts: object) -> list[str]:
    """The texts in which the secret can be read: as bytes literal, hexadecimal, or decimal."""
    forms = (repr(secret)[2:-1], secret.hex(), str(int.from_bytes(secret, "big")))
    return [
        text for text in (f"{value!r} {value!s}" for value in texts) if any(form in text for form in forms)
    ]


def test_the_search_itself_finds_a_secret() -> None:
    secret = entropy_from(1)(32)
    for value in (secret, secret.hex(), {"x": [secret]}, ValueError(secret), int.from_bytes(secret, "big")):
        assert shown(secret, value)


def test_nothing_that_a_whole_campaign_does_or_says_shows_a_secret() -> None:
    fleet = Fleet(8)
    secrets: set[bytes] = set()
    texts: list[str] = []
    wire: list[bytes] = []

    def watch(who: str, effect: object) -> None:
        texts.append(f"{effect!r} {effect!s}")
        if isinstance(effect, device_effects.Seal):
            secrets.update((effect.prekey, effect.entropy))
        if isinstance(effect, device_effects.Save) and effect.state.prekey:
            secrets.add(effect.state.prekey)
        if isinstance(effect, device_effects.Publish | hub_effects.Publish):
            wire.append(effect.payload)

    fleet.before_effect = watch
    fleet.begin(campaign(8))
    fleet.settle()
    secrets.update(device.signer.key.private_bytes_raw() for device in fleet.devices.values())
    secrets.add(fleet.root.root.private_bytes_raw())
    secrets.add(fleet.hub_signer.key.private_bytes_raw())
    assert len(secrets) > 8 * 2 * 2
    everything = "\n".join(texts) + repr(fleet.ledger) + repr([d.told for d in fleet.devices.values()])
    for secret in secrets:
        assert not shown(secret, everything)
        assert not [payload for payload in wire if secret in payload]
    assert any("Seal(" in text for text in texts)


def test_states_and_identities_hide_their_keys() -> None:
    stage = Bench()
    state, signer = stage.victim.saved, stage.victim.signer
    prekey, key = state.prekey, signer.key.private_bytes_raw()
    assert len(prekey) == 32
    assert not shown(prekey, state, device_effects.Save(state), stage.victim.agent)
    assert not shown(key, signer, stage.victim.agent, stage.victim.agent.verifier)
    assert X25519PrivateKey.from_private_bytes(prekey).public_key().public_bytes_raw() in state.ready


def test_the_authority_hides_its_roots() -> None:
    entropy = entropy_from(5)(96)
    root = new_authority("test", entropy, now=1_800_000_000.0)
    number = root.tls_key.private_numbers().private_value
    der = root.tls_key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    for secret in (entropy[:32], entropy[32:80], number.to_bytes(32, "big"), der):
        assert not shown(secret, root, authority(0))


def test_a_join_token_hides_its_secret_and_prints_only_when_asked() -> None:
    token = JoinToken("https://hub:1", bytes(32), entropy_from(2)(20))
    request = JoinRequest(token.secret, "PEM", bytes(32))
    assert not shown(token.secret, token, request)
    assert token.text() not in f"{token!r} {token!s}"
    assert JoinToken.parse(token.text()).secret == token.secret


def test_errors_about_keys_do_not_quote_them() -> None:
    short = entropy_from(3)(16)
    with pytest.raises(FedgeError) as refusal:
        p256_key(short)
    assert not shown(short, refusal.value)
    token = JoinToken("https://hub:1", bytes(32), entropy_from(2)(20))
    with pytest.raises(FedgeError) as refusal:
        JoinToken.parse(token.text()[:-3] + "!!!!")
    assert token.text()[10:-3] not in str(refusal.value)
