"""FORM: when devices are put into blocs, once and for all. The order and its proof are `fedge.formation`'s.

The first formation waits until enough devices are READY; from then on newcomers become blocs of newcomers, at most
once in `form_seconds`. A device is in one bloc of a campaign and never in a second one (law 1), so a tail that fills
no bloc waits. The first OPEN of a bloc brings its card.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from fedge import formation, limits
from fedge.formation import Candidate
from fedge.messages import BlocCard, Facts, Ready, decode, decode_envelope
from hub.admission import Admission
from hub.book import CampaignState, Contact
from hub.effects import BlocRow, Effect, LedgerEntry, Save


class Former(Admission):
    """Turns READY devices without a bloc into blocs."""

    def _newcomer(self, now: float, campaign: CampaignState) -> Iterator[Effect]:
        if not campaign.row.formations:
            if len(campaign.newcomers) >= campaign.row.form_at_devices:
                yield from self._form(now, campaign)
        elif now >= campaign.forms_at:
            yield from self._form(now, campaign)

    def _form_again(self, now: float, campaign: CampaignState) -> Iterator[Effect]:
        if now >= campaign.forms_at:  # else newcomers were formed meanwhile
            yield from self._form(now, campaign)

    def _form(self, now: float, campaign: CampaignState) -> Iterator[Effect]:
        row, number = campaign.row, campaign.row.formations + 1
        fills_none = len(campaign.newcomers) < row.bloc_devices
        if fills_none or row.closed or campaign.over(now) or number > limits.FORMATIONS_MAX:
            return
        said: dict[Facts, Facts] = {}
        candidates = [_candidate(contact, said) for contact in campaign.newcomers.values()]
        beacon = campaign.beacon(number)
        blocs = formation.cut(candidates, row.bloc_devices, beacon, row.adapter.size)
        names = [f"bloc-{len(campaign.blocs) + index}" for index in range(len(blocs))]
        yield self._save(msgspec.structs.replace(row, formations=number, formed_at=row.formed_at or now))
        for card in formation.make_cards(row.id, blocs, names, beacon=beacon, formation=number):
            yield from self._found(now, campaign, card)
        campaign.newcomers = {
            name: contact for name, contact in campaign.newcomers.items() if not contact.bloc_in(campaign)
        }
        campaign.forms_at = now + row.form_seconds
        self._at(campaign.forms_at, self._form_again, campaign)
        for name in names:  # all of them before the first is opened, so that their order decides
            self._count_live(now, campaign.blocs[name])
            self._queue(now, campaign.blocs[name])
        yield from self._admit(now, campaign)

    def _found(self, now: float, campaign: CampaignState, card: BlocCard) -> Iterator[Effect]:
        """One bloc begins to be."""
        contacts = [campaign.newcomers[member] for member in card.members]
        yield self._save(
            BlocRow(
                campaign=card.campaign,
                id=card.bloc,
                members=tuple(contact.device for contact in contacts),  # one string for each device
                card=self.signer.seal(card),
                formed_at=now,
                formation=card.formation,
            )
        )
        detail: dict[str, float | int | str] = {
            "members": ",".join(card.members),
            "formation": card.formation,
            "root": card.root.hex(),
            "index": card.index,
            "blocs": card.blocs,
            "devices": card.blocs * len(card.members),
        }
        yield Save(LedgerEntry(at=now, kind="formed", campaign=card.campaign, bloc=card.bloc, detail=detail))
        campaign.blocs[card.bloc].ready = len(contacts)


def _candidate(contact: Contact, said: dict[Facts, Facts]) -> Candidate:
    """What the order asks of a READY. Many devices say the same facts: `said` has them once, as a fleet's are many."""
    body = decode_envelope(contact.envelope).body
    ready = decode(body, Ready)
    facts = said.setdefault(ready.facts, ready.facts)
    lean = msgspec.structs.replace(ready, campaign="", device=contact.device, prekey=b"", facts=facts)
    return Candidate.of(lean, body, contact.envelope)
