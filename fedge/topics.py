"""Where each message travels. At most seven slashes (AWS IoT); a device's id is its certificate's common name.

A device may write only below `fl/v1/d/<id>/up/` and to its own state, and read only its own `dn/`, announcements
and the hub's state: one static pattern ACL serves the whole fleet.
"""

from __future__ import annotations

from typing import Final

ROOT: Final = "fl/v1"
HUB_STATE: Final = f"{ROOT}/hub/state"
ANNOUNCEMENTS: Final = f"{ROOT}/ann/+"
_DEVICES: Final = f"{ROOT}/d/"
ALL_UP: Final = f"{ROOT}/d/+/up/#"
ALL_STATES: Final = f"{ROOT}/d/+/state"


def announcement(campaign: str) -> str:
    """Retained: the newest announcement of a campaign."""
    return f"{ROOT}/ann/{campaign}"


def state(device: str) -> str:
    """Retained: a device's presence, also its last will."""
    return f"{ROOT}/d/{device}/state"


def control(device: str) -> str:
    """device -> hub: envelopes (READY, REPORT, DECLINE)."""
    return f"{ROOT}/d/{device}/up/m"


def chunks(device: str) -> str:
    """device -> hub: frames that carry the chunks of a report."""
    return f"{ROOT}/d/{device}/up/c"


def commands(device: str) -> str:
    """hub -> device: envelopes (bloc card, OPEN, RESULT)."""
    return f"{ROOT}/d/{device}/dn/cmd"


def receipts(device: str) -> str:
    """hub -> device: RECEIPT, the only proof of delivery."""
    return f"{ROOT}/d/{device}/dn/ack"


def device_of(topic: str) -> str:
    """The device whose topic this is, or an empty string."""
    if not topic.startswith(_DEVICES):
        return ""
    start = len(_DEVICES)
    return topic[start : max(start, topic.find("/", start))]
