"""Who may say and hear what at the broker: one rule for the whole fleet, told to every broker in its own words.

A device is the common name of its certificate. It may write below its own `up/` and its own state, and read its own
`dn/`, announcements and the hub's state. The hub may everything below the root. Enrolling a device changes nothing.
"""

from __future__ import annotations

from typing import Final

from fedge import topics
from hub.authority import HUB

_DEVICE: Final = f"{topics.ROOT}/d/%u"

WRITES: Final = (f"{_DEVICE}/up/#", f"{_DEVICE}/state")
READS: Final = (f"{_DEVICE}/dn/#", f"{topics.ROOT}/ann/#", topics.HUB_STATE)


def mosquitto_rules() -> str:
    """The access list in mosquitto's words (mosquitto.conf(5), acl_file)."""
    lines = [f"user {HUB}", f"topic readwrite {topics.ROOT}/#", ""]
    lines += [f"pattern write {rule}" for rule in WRITES]
    lines += [f"pattern read {rule}" for rule in READS]
    return "\n".join(lines) + "\n"


def may_write(name: str, topic: str) -> bool:
    """Whether `name` may publish on `topic`."""
    return _allowed(name, topic, WRITES)


def may_read(name: str, topic_or_filter: str) -> bool:
    """Whether `name` may receive this topic, or everything that this filter could match."""
    return _allowed(name, topic_or_filter, READS)


def _allowed(name: str, topic: str, rules: tuple[str, ...]) -> bool:
    if name == HUB:
        return topic.startswith(f"{topics.ROOT}/")
    return any(_within(topic, rule.replace("%u", name)) for rule in rules)


def _within(topic: str, rule: str) -> bool:
    """`rule` is a literal, or one with `#` at its end: what begins alike is inside, wildcards included."""
    if rule.endswith("/#"):
        return topic.startswith(rule[:-1])
    return topic == rule
